"""Is a GPU's arithmetic right, and how near to its limits do drawing and training of a 1B-parameter model come?

    python tests/benchmarks/gpu.py --out gpu                       # on a CUDA GPU with 40 GB: under 10 minutes
    python tests/benchmarks/gpu.py --out gpu --device cpu --small  # to try this script

check: the largest differences of log-probabilities from those of the CPU in float32, for full attention and the paper's
patterns: the forward pass, gradients, and steps of drawing as they are there, from CUDA graphs and compiled blocks.
drawing: image tokens per second of whole pictures in bfloat16, and the share of what reading weights, keys and values
takes at the measured bandwidth. training: the share of the measured rate of bfloat16 products that the operations of
the model (`dalle describe`, recomputing not counted) make up, in autocast. OUT/gpu.json holds everything.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import table
from torch import Tensor

from dalle import gpu
from dalle.describe import flops, read
from dalle.layout import KINDS
from dalle.model import DALLE, DALLEConfig, losses
from dalle.packing import packed
from dalle.sampling import sample
from dvae.errors import EnvironmentProblem, report
from dvae.files import write_json
from dvae.lit import versions

PAPER = dict(vocab_text=16384, text_length=256, vocab_image=8192, grid=(32, 32))
LARGE = dict(**PAPER, depth=24, width=1920, heads=30)  # 1.1 billion parameters
SMALL = dict(vocab_text=64, text_length=8, vocab_image=96, grid=(6, 13), depth=4, width=64, heads=4)
TRAINED = 16  # pictures to an update
BATCHES = (1, 16, 64)
CHECKED = 2e-3, 0.15  # largest differences of log-probabilities that pass, float32 and bfloat16


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """The median, after one call to warm up."""
    times = []
    for _ in range(repetitions + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def inputs(config: DALLEConfig, batch: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(config.vocab_text, (batch, config.text_length))
    return text, torch.randint(config.vocab_image, (batch, *config.grid))


def for_drawing(model: DALLE, precision: str) -> Any:
    """As a pipeline draws with it."""
    fast = packed(model, precision)
    return gpu.Replayed(fast) if model.start.is_cuda else fast


# ------------------------------------------------------------------------------------------------------------ the check


def steps(model: Any, text: Tensor, image: Tensor) -> Tensor:
    """Log-probabilities (B, N, K) cell by cell."""
    cache, tokens = model.prefill(text), image.flatten(1)
    logits = [model.step(tokens[:, n - 1] if n else None, n, cache).clone() for n in range(tokens.shape[1])]
    return torch.stack(logits, 1).log_softmax(-1)


def gradient(model: DALLE, text: Tensor, image: Tensor) -> Tensor:
    """Of the image loss, all parameters in one row."""
    kept = torch.ones(len(text), dtype=torch.bool, device=text.device)
    found = losses(model(text, image), text, image, kept)
    parts = torch.autograd.grad(found.image + found.text, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts]).cpu()


def check(device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of what was compared, its difference, and whether it passes."""
    for patterns in ("full", "paper", KINDS):
        torch.manual_seed(0)
        model = DALLE(DALLEConfig(**SMALL, patterns=patterns))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        text, image = inputs(model.config, 5)
        expected = model(text, image).image.log_softmax(-1).detach()
        slope = gradient(model, text, image)
        model, text, image = model.to(device), text.to(device), image.to(device)

        def row(what: str, error: float, most: float, patterns: Any = patterns) -> dict[str, Any]:
            name = patterns if isinstance(patterns, str) else "all kinds"
            return {"patterns": name, "what": what, "error": error, "most": most, "passes": error <= most}

        def distance(logs: Tensor, expected: Tensor = expected) -> float:
            return float((logs.detach().cpu() - expected).abs().max())

        yield row("forward", distance(model(text, image).image.log_softmax(-1)), CHECKED[0])
        yield row("gradient", float((gradient(model, text, image) - slope).norm() / slope.norm()), CHECKED[0])
        for kind in set(model.config.kinds) - {"full"}:
            model.sparse[kind, False] = gpu.sparse(model.layout, kind, device)
        if model.sparse:
            with torch.no_grad():
                yield row("forward, sparse", distance(model(text, image).image.log_softmax(-1)), CHECKED[0])
        if model.sparse and device.type == "cuda":  # flex attention has no gradients on a CPU
            error = float((gradient(model, text, image) - slope).norm() / slope.norm())
            yield row("gradient, sparse", error, CHECKED[0])
        for precision, most in zip(("float32", "bfloat16"), CHECKED, strict=True):
            logs = steps(for_drawing(model, precision), text, image)
            yield row(f"steps, {precision}", distance(logs), most)


# ----------------------------------------------------------------------------------------------------------- the limits


def limits(device: torch.device, small: bool) -> dict[str, float]:
    """Bytes/s of copying, read and written counted, and operations/s of a bfloat16 product."""
    size, side = (2**22, 512) if small else (2**30, 8192)
    source = torch.empty(size, dtype=torch.int8, device=device).random_(100)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16).unbind(0)
    return {
        "bytes/s": 2 * size / seconds(lambda: target.copy_(source), device, 20),
        "bfloat16 operations/s": 2 * side**3 / seconds(lambda: a @ b, device, 20),
    }


# ------------------------------------------------------------------------------------------------------ the large model


def drawing(model: DALLE, limit: dict[str, float], small: bool) -> Iterator[dict[str, Any]]:
    """Rows for each number of pictures; the first picture of a number compiles and captures, and is not counted."""
    config, layout, device = model.config, model.layout, model.start.device
    fast, cells = for_drawing(model, "bfloat16"), layout.cells
    matrices = sum(weight.numel() for weight in model.blocks.parameters() if weight.ndim == 2)
    stored = 2 if device.type == "cuda" else 4  # bytes of a key
    null = torch.arange(config.vocab_text, config.vocab_text + config.text_length, device=device)[None]
    for batch in (1, 2) if small else BATCHES:
        text = inputs(config, 1)[0].to(device)
        start = time.perf_counter()
        work = partial(sample, fast, text, batch, null_ids=null, top_k=min(256, config.vocab_image), batch=batch)
        taken = seconds(work, device, 2)
        read_keys = sum(range(layout.image.start + 1, layout.states + 1)) / cells
        size = 2 * matrices + 4 * model.image_head.weight.numel()
        size += stored * 2 * config.depth * config.width * batch * read_keys
        step, bound = taken / cells, size / limit["bytes/s"]
        yield {
            "pictures": batch,
            "tokens/s": batch * cells / taken,
            "ms a step": 1e3 * step,
            "bound, ms": 1e3 * bound,
            "of the bound": bound / step,
            "seconds to warm up": time.perf_counter() - start - 2 * taken,
        }


def training(config: DALLEConfig, limit: dict[str, float], device: torch.device, small: bool) -> Iterator[dict]:
    """Rows of a step of training, with full attention and with the paper's patterns, compiled and not."""
    batch = 2 if small else TRAINED
    for patterns, compiles in (("full", False), ("full", True), ("paper", True)):
        model = DALLE(DALLEConfig(**{**vars(config), "patterns": patterns})).to(device)
        text, image = (tensor.to(device) for tensor in inputs(model.config, batch))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        kept = torch.ones(batch, dtype=torch.bool, device=device)

        def step(model=model, text=text, image=image, optimiser=optimiser, kept=kept) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                found = losses(model(text, image), text, image, kept)
                loss = found.text / 8 + 7 / 8 * found.image
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        if device.type == "cuda":
            for kind in set(model.config.kinds) - {"full"}:
                model.sparse[kind, False] = gpu.sparse(model.layout, kind, device)
        if compiles and device.type == "cuda":
            gpu.compiled(model.blocks, step)
        taken = seconds(step, device, 3)
        plan = read("dalle/demo", {"trainer": {"max_steps": 1}, "data": {"batch_size": batch}})
        needed = batch * flops(model, plan)["one picture"]
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        yield {
            "patterns": patterns,
            "compiled": compiles,
            "pictures/s": batch / taken,
            "of the rate": needed / taken / limit["bfloat16 operations/s"],
            "GiB": memory,
        }
        del model, optimiser, step
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def run(given: argparse.Namespace) -> None:
    if given.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("there is no CUDA GPU here", "try the script with --device cpu --small")
    device, out = torch.device(given.device), Path(given.out)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result: dict[str, Any] = {"device": name, "versions": versions(), "parts": {}}

    def part(name: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        result["parts"][name] = list(rows)
        write_json(out / "gpu.json", result)  # after each part, so that an interruption loses but one
        print(f"\n{name}, {time.perf_counter() - start:.0f} s\n{table(result['parts'][name])}", flush=True)
        return result["parts"][name]

    print(name, torch.__version__)
    limit = part("limits", iter([limits(device, given.small)]))[0]
    checked = part("check", check(device))
    config = DALLEConfig(**(SMALL if given.small else LARGE))
    model = DALLE(config).to(device).requires_grad_(False)
    print(f"\n{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    with torch.inference_mode() if device.type == "cuda" else nullcontext():
        part("drawing", drawing(model, limit, given.small))
    del model
    part("training", training(config, limit, device, given.small))
    print(f"\nwrote {out / 'gpu.json'}")
    if not all(row["passes"] for row in checked):
        raise EnvironmentProblem(f"{name} computes something else than a CPU", "see the rows of check that do not pass")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu", help="folder for gpu.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this script")
    return report(partial(run, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
