"""The networks: DeepSeek-V3 (MLA, MoE, MTP) and the dense Qwen2 and Llama, behind one `CausalLM`."""

from jevons.model.cache import BatchMeta, KVCache, build_meta
from jevons.model.network import CausalLM, TrainOutput, build_model

__all__ = ["BatchMeta", "CausalLM", "KVCache", "TrainOutput", "build_meta", "build_model"]
