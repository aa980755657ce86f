"""Peak host memory of `almost-jax import` on a synthetic LLaMA in many shards, against its final parameters.

    .venv/bin/python tests/benchmarks/bench_import_memory.py [--gigabytes 2] [--dtype float32]

The shape is that of a real model (a wide vocabulary; large layers with --gigabytes), the numbers are random, in
bfloat16. Import runs in a process of its own, whose largest resident set the system reports, with what is mapped from
files. Prints one JSON object; `over_parameters_gb` must stay below 2.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.core.llama import LlamaConfig
from almost_jax.io.hf_config import render_config
from almost_jax.io.weights import model_leaves

GIGABYTE = 10**9
# A tensor of random numbers is repeated: drawing new ones for all would take most of the time.
NOISE = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(ml_dtypes.bfloat16)


def shape_of(gigabytes: float) -> LlamaConfig:
    """A LLaMA of about so many bytes in bfloat16: a quarter in embedding and output, the rest in layers."""
    width = max(int(math.sqrt(gigabytes * GIGABYTE / 2 / 160) // 64) * 64, 64)
    heads = width // 64
    head_bytes = 2 * 2 * 16 * width * width // 8
    layer_bytes = 2 * (2 * width * width + 2 * width * width + 3 * width * 4 * width)
    layers = max(round((gigabytes * GIGABYTE - head_bytes) / layer_bytes), 2)
    return LlamaConfig(16 * width // 8, width, 4 * width, layers, heads, heads, 64)


def write_model(folder: Path, config: LlamaConfig) -> int:
    """Write the model, a shard per layer; returns the number of files."""
    leaves = model_leaves(config, False)
    groups = [[leaf for leaf in leaves if not leaf.layered]]
    groups += [[leaf for leaf in leaves if leaf.layered] for _ in range(config.num_layers)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {leaf.tensor(number - 1): np.resize(NOISE, leaf.stored_shape) for leaf in group}
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(render_config(config, "bfloat16", False)))
    backend = Backend(models.WordLevel({"<eos>": 0, "<unk>": 1, "word": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(str(folder))
    return len(groups)


def main() -> None:
    """Write a model, import it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the source, in bfloat16")
    parser.add_argument("--dtype", default="bfloat16", help="of the stored parameters: bfloat16 or float32")
    given = parser.parse_args()
    config = shape_of(given.gigabytes)
    count = sum(
        math.prod(leaf.shape) * (config.num_layers if leaf.layered else 1) for leaf in model_leaves(config, False)
    )
    final = count * {"bfloat16": 2, "float32": 4}[given.dtype]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        files = write_model(source, config)
        command = [sys.executable, "-m", "almost_jax", "import", str(source), f"{folder}/ours", "--dtype", given.dtype]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        seconds = time.perf_counter() - start
    # Kilobytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "benchmark": "import_memory",
                "parameters": count,
                "shards": files,
                "final_parameters_gb": round(final / GIGABYTE, 2),
                "peak_gb": round(peak / GIGABYTE, 2),
                "over_parameters_gb": round((peak - final) / GIGABYTE, 2),
                "seconds": round(seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
