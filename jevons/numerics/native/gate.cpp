// The choice of experts by a gate's scores, a token at a time: what jevons/model/moe.py does in a dozen torch calls.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Indices of the `count` largest of values[0 .. size] that `open` allows, largest first; the earlier of two that are equal.
// A NaN is taken only where nothing else is left, or where it comes first.
void largest(const float* values, int64_t size, std::vector<char>& open, int64_t count, int64_t* to) {
    for (int64_t i = 0; i < count; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < size; e++)
            if (open[e] && (best < 0 || values[e] > values[best])) best = e;
        open[best] = 0;
        to[i] = best;
    }
}

}  // namespace

// scores [tokens, experts] after the sigmoid or softmax; `bias` [experts] or null. Groups score the sum of their two best
// experts (`by_two`) or their best one, and the experts of `kept` of them are chosen from. -> chosen and weights [tokens, k],
// rows [experts]: tokens of each.
extern "C" void gate_choose(const float* scores, const float* bias, int64_t tokens, int64_t experts, int64_t groups, int64_t kept,
                            int by_two, int64_t k, int normalise, float factor, int64_t* chosen, float* weights, int64_t* rows) {
    const int64_t size = experts / groups;
    std::vector<float> choice(experts), group(groups);
    std::vector<char> open(experts), open_groups(groups);
    std::vector<int64_t> best(groups);
    std::fill(rows, rows + experts, 0);
    for (int64_t n = 0; n < tokens; n++) {
        const float* s = scores + n * experts;
        for (int64_t e = 0; e < experts; e++) choice[e] = bias ? s[e] + bias[e] : s[e];
        std::fill(open.begin(), open.end(), groups == 1);
        if (groups > 1) {
            for (int64_t g = 0; g < groups; g++) {
                const float* own = choice.data() + g * size;
                float first = own[0], second = size > 1 ? own[1] : 0;
                if (second > first) std::swap(first, second);
                for (int64_t e = 2; e < size; e++) {
                    if (own[e] > first) second = first, first = own[e];
                    else if (own[e] > second) second = own[e];
                }
                group[g] = by_two ? first + second : first;
            }
            std::fill(open_groups.begin(), open_groups.end(), 1);
            largest(group.data(), groups, open_groups, kept, best.data());
            for (int64_t i = 0; i < kept; i++) std::fill_n(open.begin() + best[i] * size, size, 1);
        }
        int64_t* out = chosen + n * k;
        largest(choice.data(), experts, open, k, out);
        float sum = 1e-20f;
        for (int64_t i = 0; i < k; i++) sum += s[out[i]];
        for (int64_t i = 0; i < k; i++) {
            weights[n * k + i] = (normalise ? s[out[i]] / sum : s[out[i]]) * factor;
            rows[out[i]]++;
        }
    }
}
