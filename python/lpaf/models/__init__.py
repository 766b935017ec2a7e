"""Models: which layers are compressed, how they are counted, saved and reloaded."""

from .checkpoint import load_dense, load_task_model, load_tokenizer, save_compressed
from .count import encoder_params, forward_macs, resolve_rank
from .quantizer import CompressionConfig
from .targets import encoder_linears, find_targets

__all__ = [
    "CompressionConfig",
    "encoder_linears",
    "encoder_params",
    "find_targets",
    "forward_macs",
    "load_dense",
    "load_task_model",
    "load_tokenizer",
    "resolve_rank",
    "save_compressed",
]
