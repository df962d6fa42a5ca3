"""A checkpoint as one GGUF file, the way llama.cpp wants it: its names and keys come from the `gguf` package.

llama.cpp absorbs MLA: `kv_b_proj` is written as its key half, transposed, and its value half; experts are stacked; Llama's
query and key rows are put in pairs, because its rotary embedding turns neighbours where Hugging Face turns halves.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from jevons.config import ModelConfig
from jevons.data.tokenizer import PRETOKENIZE_REGEX
from jevons.model import build_model
from jevons.model.layers import rotary_frequencies
from jevons.store.files import CheckpointError
from jevons.store.stream import ConvertError, Progress, Source

Q = gguf.GGMLQuantizationType
_TYPES = {"f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0, "q4_0": Q.Q4_0}
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
               "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
_ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
                  "DeepseekV3ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2, "DeepseekV2ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")
# How a tokenizer cuts text, by its patterns -> llama.cpp's name for it. V2's are long lists of letters: their first will do.
_PRE = {
    (PRETOKENIZE_REGEX,): "qwen2",
    (PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|"),): "llama-bpe",
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
     r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
     r"|\s*[\r\n]+|\s+(?!\S)|\s+"): "deepseek-v3",
    (r"[\r\n]", r"\s?[A-Za-zµ"): "deepseek-llm",
}


@dataclass
class _Entry:
    name: str
    shape: tuple[int, ...]
    parts: list[str]  # published tensors, one after the other
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # what becomes of each
    qtype: Q = Q.F32


def write_gguf(source: Source, path: Path, kind: str, progress: Progress) -> tuple[int, list[str]]:
    """Write the file and fsync it: how many tensors, and what llama.cpp cannot hold, or not in this type, a line each.

    Raises ConvertError for a model or tokenizer that llama.cpp would not run right, CheckpointError naming a tensor that is
    missing, surplus, of a wrong shape or not finite in this type, ConfigError, OSError.
    """
    c = ModelConfig.from_hf(source.config, str(source.directory / "config.json"))
    expected = {name: tuple(view.shape) for name, view in build_model(c, device="meta").hf_state_dict().items()}
    mtp = tuple(f"model.layers.{c.num_hidden_layers + i}." for i in range(c.num_nextn_predict_layers))
    _check(source, c, expected, mtp)
    arch = _ARCHITECTURES[c.architecture]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    notes = _describe(writer, c)
    _add_tokenizer(writer, source.directory, c.vocab_size)
    writer.add_name(source.directory.resolve().name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    entries = list(_entries(c, {n: s for n, s in expected.items() if not n.startswith(mtp)} if mtp else expected, names))
    if (rotary := _llama3_factors(c)) is not None:
        entries.append(_Entry("rope_freqs.weight", tuple(rotary.shape), [""], lambda _: rotary))
    for entry in entries:
        entry.qtype = _type_of(entry, kind, c.tie_word_embeddings)
        block, size = gguf.GGML_QUANT_SIZES[entry.qtype]
        nbytes = math.prod(entry.shape) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=entry.qtype)
    unfit = [e for e in entries if kind in ("q8_0", "q4_0") and e.qtype == Q.F16]
    if unfit:
        notes.append(f"{kind} packs rows of 32: {len(unfit)} tensors with other rows are f16, {unfit[0].name} the first")
    if left := [n for n in source.tensors if mtp and n.startswith(mtp)]:
        size = sum(math.prod(source.tensors[n].shape) for n in left)
        notes.append(f"llama.cpp's {writer.arch} has no MTP module: {len(left)} tensors of {', '.join(m[:-1] for m in mtp)} "
                     f"({size:,} parameters, copies included) are left out")
    _write(writer, path, source, entries, progress)
    return len(entries), notes


def _write(writer: gguf.GGUFWriter, path: Path, source: Source, entries: list[_Entry], progress: Progress) -> None:
    total = sum(source.tensors[part].end - source.tensors[part].start for e in entries for part in e.parts if part)
    done = 0
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry in entries:
            start = file.tell()
            for part in entry.parts:  # the package would take a layer's experts as one array, 15 GB of float32 in V3
                tensor = source.read(part, torch.float16 if entry.qtype == Q.F16 else torch.float32) if part else None
                array = np.ascontiguousarray(entry.change(tensor).numpy())
                file.write(gguf.quantize(array, entry.qtype).data)
                if part:
                    done += source.tensors[part].end - source.tensors[part].start
                    progress(min(done, total), total)
            writer.write_padding(file, file.tell() - start)
        file.flush()
        os.fsync(file.fileno())
    finally:
        for file in writer.fout or []:
            file.close()


def _check(source: Source, c: ModelConfig, expected: dict[str, tuple[int, ...]], mtp: tuple[str, ...]) -> None:
    """Names and shapes against the network's; the MTP layer, which is left out, may be missing."""
    for name, shape in expected.items():
        if name not in source.tensors:
            if mtp and name.startswith(mtp):
                continue
            raise CheckpointError(f"{source.directory}: tensor {name} is missing, which config.json asks for")
        info = source.tensors[name]
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name} has shape {list(info.shape)}; {list(shape)} would be right")
    for name, info in source.tensors.items():
        if name not in expected and not (c.tie_word_embeddings and name == "lm_head.weight"):
            raise CheckpointError(f"{info.file}: tensor {name} has no place in this {c.architecture}")


def _entries(c: ModelConfig, expected: dict[str, tuple[int, ...]], names: gguf.TensorNameMap) -> Iterator[_Entry]:
    for name, shape in expected.items():
        match = _EXPERT.fullmatch(name)
        if match and match[2] != "0":
            continue
        if match:
            count = c.n_routed_experts
            yield _Entry(_named(names, match[1] + match[3]), (count, *shape), [f"{match[1]}.{e}{match[3]}" for e in range(count)])
        elif name.endswith(".kv_b_proj.weight"):
            heads, nope, v, rank = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
            halves = lambda w, h=heads, r=rank: w.view(h, -1, r)
            yield _Entry(_named(names, name.replace("kv_b", "k_b")), (heads, rank, nope), [name],
                         lambda w, n=nope, halves=halves: halves(w)[:, :n].transpose(1, 2))
            yield _Entry(_named(names, name.replace("kv_b", "v_b")), (heads, v, rank), [name],
                         lambda w, n=nope, halves=halves: halves(w)[:, n:])
        elif name.endswith(".e_score_correction_bias"):
            yield _Entry(_named(names, name.removesuffix("_bias") + ".bias"), shape, [name])
        elif c.architecture == "LlamaForCausalLM" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = c.num_attention_heads if ".q_proj." in name else c.kv_heads
            yield _Entry(_named(names, name), shape, [name],
                         lambda w, h=heads: w.view(h, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape))
        else:
            yield _Entry(_named(names, name), shape, [name])


def _named(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConvertError(f"tensor {name} has no name in GGUF")
    return found


def _type_of(entry: _Entry, kind: str, tied: bool) -> Q:
    """Vectors and routers stay float32; in Q4_0 the head has eight bits, which llama.cpp's own quantiser also grants it."""
    if len(entry.shape) == 1 or ".ffn_gate_inp." in entry.name:
        return Q.F32
    if kind in ("q8_0", "q4_0") and entry.shape[-1] % 32:
        return Q.F16
    if kind == "q4_0" and entry.name == ("token_embd.weight" if tied else "output.weight"):
        return Q.Q8_0
    return _TYPES[kind]


def _describe(writer: gguf.GGUFWriter, c: ModelConfig) -> list[str]:
    """The hyperparameters; a line for each thing that llama.cpp does otherwise. Raises ConvertError where it could not load."""
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    _describe_rope(writer, c)
    if not c.is_deepseek:
        writer.add_head_count_kv(c.kv_heads)
        writer.add_key_length(c.per_head_dim)
        writer.add_value_length(c.per_head_dim)
        writer.add_rope_dimension_count(c.per_head_dim)
        return []
    if c.q_lora_rank and c.num_hidden_layers in (26, 27):
        raise ConvertError(f"llama.cpp takes a deepseek2 of {c.num_hidden_layers} layers for V2-Lite, which has no q_lora_rank; "
                           f"this one has {c.q_lora_rank}")
    if c.is_moe and not c.n_shared_experts:
        raise ConvertError("llama.cpp's deepseek2 needs shared experts; n_shared_experts is 0")
    writer.add_head_count_kv(1)  # all heads share the latent
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.per_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_q_lora_rank(c.q_lora_rank or 0)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_leading_dense_block_count(min(c.first_k_dense_replace, c.num_hidden_layers) if c.is_moe else c.num_hidden_layers)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    sigmoid = c.scoring_func == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if c.topk_group >= c.n_group:
        return []
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)
    return [] if sigmoid else ["llama.cpp scores a group of experts by the sum of its two best, this model by its best alone: "
                               "some tokens will go to other experts"]


def _describe_rope(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    rope = c.rope_scaling or {}
    if rope.get("rope_type") != "yarn":
        return
    both = (rope.get("mscale", 0), rope.get("mscale_all_dim", 0))
    if rope.get("attention_factor") is not None or (both[0] != both[1] or not both[0] if c.is_deepseek else any(both)):
        raise ConvertError(f"llama.cpp would scale attention otherwise than rope_scaling {rope} does; "
                           f"{'mscale = mscale_all_dim' if c.is_deepseek else 'YaRN without mscale'} would be right")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32))
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1))
    if c.is_deepseek:
        writer.add_rope_scaling_yarn_log_mul(0.1 * both[1])  # llama.cpp divides deepseek2's by 0.1 again


def _llama3_factors(c: ModelConfig) -> torch.Tensor | None:
    """Llama 3 stretches slow frequencies; GGUF holds what each is divided by, [head_dim / 2]. None for other models."""
    if (c.rope_scaling or {}).get("rope_type") != "llama3":
        return None
    plain, _ = rotary_frequencies(c.model_copy(update={"rope_scaling": None}))
    return (plain / rotary_frequencies(c)[0]).float()


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Tokens, merges, special ids and chat template of tokenizer.json and tokenizer_config.json."""
    path = directory / "tokenizer.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model, added = raw["model"], raw.get("added_tokens", [])
        ids = {int(i): (token, gguf.TokenType.NORMAL) for token, i in model["vocab"].items()}
        ids |= {a["id"]: (a["content"], gguf.TokenType.CONTROL if a["special"] else gguf.TokenType.USER_DEFINED) for a in added}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a GGUF file holds its tokenizer") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer.json of the BPE kind ({type(error).__name__}: {error})") from None
    if max(ids) >= vocab_size:
        raise CheckpointError(f"{path} has id {max(ids)}, config.json's vocab_size is {vocab_size}")
    table = [ids.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(_pre_tokenizer(raw, str(path)))
    writer.add_token_list([token for token, _ in table])
    writer.add_token_types([kind for _, kind in table])
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(raw: dict[str, Any], source: str) -> str:
    pre = raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = tuple(step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")  # some files hold them bare
                     for step in steps if step.get("type") == "Split")
    if any(step.get("type") == "ByteLevel" for step in steps) and raw["model"].get("type") == "BPE":
        for known, name in _PRE.items():
            if patterns == known or (name == "deepseek-llm" and [p.startswith(k) for p, k in zip(patterns, known, strict=False)]
                                     == [True, True]):
                return name
    raise ConvertError(f"{source} cuts text by {list(patterns) or pre.get('type')!r:.200}, which has no name in llama.cpp; "
                       f"byte-level BPE with the patterns of {', '.join(sorted(_PRE.values()))} would be right")
