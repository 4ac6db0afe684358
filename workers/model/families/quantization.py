"""`quantization_config`: weights kept in fewer bits, which `workers.model.quantized` reads."""

from __future__ import annotations

from workers.model.families.keys import Keys
from workers.model.spec import Quantization


def read_quantization(keys: Keys) -> Quantization | None:
    """None: the weights are kept as they are. Raises CheckpointError for every other method than those two."""
    given = keys.get("quantization_config", dict, {})
    if not given:
        return None
    values = Keys(given, f"{keys.path}: quantization_config")
    method = values.get("quant_method", str, "unnamed")
    if method == "mxfp4":
        return Quantization("mxfp4", (1, 32))
    if method != "fp8":
        raise values.fail(
            f"weights quantized by {method!r} are not read; read are mxfp4, fp8 with a scale for each block of a "
            "weight, and weights of 16 or 32 bits"
        )
    values.only("fmt", "e4m3")
    values.only("expert_dtype", "fp8")
    block = values.raw("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise values.fail(
            f"weight_block_size is {block!r}; fp8 weights are read with a scale per block, [128, 128] say"
        )
    return Quantization("fp8", (block[0], block[1]))
