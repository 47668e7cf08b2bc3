"""What `dalle describe` tells of a training is what torch itself counts of one that runs."""

import contextlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from dalle.__main__ import main
from dalle.describe import PAPER, SETTINGS, Plan, activations, count, page, read
from dalle.model import DALLE, Block, DALLEConfig, losses
from dalle.pipeline import load
from dalle.prepare import Prepared
from dalle.train import ImageFirst, LitDALLE, TokenData
from dvae import forecast
from dvae.commands import dotted
from dvae.errors import DataError, UserError
from dvae.optim import Optimiser
from dvae.schedules import Schedule

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "dalle"
SMALL = DALLEConfig(50, 13, 40, (6, 7), depth=3, width=24, heads=4, mlp_ratio=3)
PLAN = Plan(SMALL, "here", False, False, True, "32-true", 2, 3, 5, updates=7)
MIXED = ["32-true", "bf16-mixed"]


def autocast(precision: str):
    """As Lightning does it."""
    if precision == "32-true":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def batch(config: DALLEConfig, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config.vocab_text, (size, config.text_length))
    return ids, torch.randint(0, config.vocab_image, (size, *config.grid)), torch.ones(size, dtype=torch.bool)


def loss(model: DALLE, size: int) -> torch.Tensor:
    ids, tokens, keep = batch(model.config, size)
    text, image = losses(model(ids, tokens), ids, tokens, keep)
    return text / 8 + image * 7 / 8


def kept(model: torch.nn.Module, precision: str, run) -> int:
    """Bytes that autograd keeps for the backward pass of `run()`, the parameters and buffers not counted."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    held, seen = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its place would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision):
        run()
    return sum(seen.values())


# --------------------------------------------------------------------------------------------------------- parameters


def test_parameters_are_those_of_a_built_model():
    model, parts = DALLE(SMALL), count(PLAN)["parameters"]
    assert parts["all"] == sum(p.numel() for p in model.parameters()) == sum(v for k, v in parts.items() if k != "all")
    blocks, numbers = model.blocks, lambda modules: sum(p.numel() for module in modules for p in module.parameters())
    assert parts["attention"] == numbers(block.attention for block in blocks)
    assert parts["MLPs"] == numbers(block.mlp for block in blocks)
    assert parts["norms"] == numbers([model.norm, *(n for b in blocks for n in (b.attention_norm, b.mlp_norm))])
    assert parts["text embedding"] == parts["text head"] == (50 + 13) * 24
    assert parts["image embedding"] == parts["image head"] == 40 * 24
    assert parts["positions and starts"] == (14 + 6 + 7 + 2) * 24


@pytest.mark.parametrize("name, width, heads", [("12b", 3968, 62), ("5.6b", 2688, 42), ("2.8b", 1920, 30),
                                                ("1.2b", 1216, 19)])  # fmt: skip
def test_the_configs_of_the_paper_have_as_many_as_the_formula_says(name, width, heads):
    plan = read(f"dalle/paper-{name}")
    counted, config = count(plan), plan.config
    block = 3 * (width + 1) * width + (width + 1) * width  # queries, keys, values; what they give
    block += (width + 1) * 4 * width + (4 * width + 1) * width + 2 * 2 * width  # MLP; two norms
    tables = 2 * (16384 + 256) + 2 * 8192 + 257 + 32 + 32 + 2  # embeddings and heads; positions; starts
    assert counted["parameters"]["all"] == 64 * block + (tables + 2) * width
    assert (config.depth, config.width, config.heads, config.patterns) == (64, width, heads, "paper")
    assert (plan.batch, plan.updates, plan.sizes_from) == (1024, 430_000, "model.expects")
    said = (CONFIGS / f"paper-{name}.yaml").read_text()
    assert f"# {counted['parameters']['all'] / 1e9:.2f} B parameters" in said
    assert f"# {counted['memory']['all'] / 2**30:.1f} GiB on each device" in said


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("muon", [False, True])
def test_weights_gradients_and_optimiser_are_those_of_a_training(muon):
    model = DALLE(SMALL)
    optimiser = Optimiser(Schedule(1e-3), muon=muon, second_moment_clip=5.0).build(model)
    loss(model, 2).backward()
    optimiser.step()
    told = count(replace(PLAN, muon=muon))["memory"]
    state = [x for of_one in optimiser.state.values() for x in of_one.values() if isinstance(x, torch.Tensor)]
    assert told["optimiser"] == sum(x.nbytes for x in state)
    assert told["weights"] == sum(p.nbytes for p in model.parameters())
    assert told["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert told["averaged weights"] == sum(p.nbytes for p in AveragedModel(model).module.parameters())
    assert count(replace(PLAN, averaged=False))["memory"]["averaged weights"] == 0
    assert told["all"] == sum(value for name, value in told.items() if name != "all")


@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize("kinds", ["full", "paper"])
def test_activations_are_what_autograd_keeps(kinds, precision):
    """Counted are the bytes of one more picture: masks are kept once for a batch, and so are weights in 16 bits."""
    config = replace(SMALL, patterns=kinds)
    model = DALLE(config)
    one, two, four = (kept(model, precision, lambda n=n: loss(model, n)) for n in (1, 2, 4))
    assert two - one == (four - two) / 2 == activations(config, precision, checkpointing=False)
    if kinds == "full":
        told = count(replace(PLAN, precision=precision))["memory"]["weights in 16 bits"]
        assert (one - (two - one)) - told in range(64), "and nothing else but some counts"
        assert bool(told) == (precision == "bf16-mixed")


@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, vocab_image=400)], ids=["wide block", "many codes"])
def test_activations_with_checkpointing(config, precision):
    """What enters each block, and then the more of two: the ends of the model, or one block that is computed again."""
    model, block = DALLE(config, checkpointing=True), Block(config, "full")
    state = model.layout.states * config.width * 4
    one, two = (kept(model, precision, lambda n=n: loss(model, n)) for n in (1, 2))
    assert torch.is_grad_enabled() and (two - one) < activations(config, precision, False) / 2
    ends = two - one - config.depth * state
    x = torch.randn(2, model.layout.states, config.width, requires_grad=True)
    inside = [kept(block, precision, lambda n=n: block(x[:n].clone())) for n in (1, 2)]
    again = inside[1] - inside[0] - state
    assert activations(config, precision, True) == config.depth * state + max(ends, again)
    assert (ends > again) == (config.vocab_image == 400) or precision == "bf16-mixed"
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    plan = replace(PLAN, config=config, precision=precision, checkpointing=True)
    told = count(plan)["memory"]
    assert told["weights in 16 bits"] == (2 * matrices if precision == "bf16-mixed" else 0)
    assert told["activations of a batch"] == 2 * activations(config, precision, True), "of a batch of two"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize(
    "width, vocab_text, vocab_image", [(192, 300, 1024), (384, 300, 64), (64, 300, 4096), (64, 8192, 500)]
)
def test_memory_is_that_of_an_update_by_operations(width, vocab_text, vocab_image, precision, checkpointing):
    """As `dalle fit` tells it: two ways to one number, but for which block is the height where it is computed again."""
    sizes = {"vocab_text": vocab_text, "text_length": 16, "vocab_image": vocab_image, "grid": (8, 8)}
    config = DALLEConfig(**sizes, depth=4, width=width, heads=4)
    plan = replace(PLAN, config=config, precision=precision, checkpointing=checkpointing, batch_size=16)
    module = LitDALLE(4, width, 4, sizes, Optimiser(Schedule(1e-3)), checkpointing=checkpointing)
    told = count(plan)["memory"]["all"]
    accumulating, at_once = (forecast.memory(module, 16, precision, more, plan.averaged) for more in (True, False))
    assert told / accumulating == pytest.approx(1, abs=0.1 if checkpointing else 0.03)
    assert 0.9 < told / at_once < 1.2, "gradients grow while activations go"


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kinds", ["full", "paper", ("conv", "row", "column")])
def test_flops_are_those_that_torch_counts(kinds, checkpointing):
    config = replace(SMALL, patterns=kinds)
    model = DALLE(config, checkpointing)
    # the plain kernel: torch's counter knows its products, and not those inside the CPU's fused one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        value = loss(model, 1)
        forward = counter.get_total_flops()
        value.backward()
    told = count(replace(PLAN, config=config, checkpointing=checkpointing))["flops"]
    assert told["forward pass"] == forward and told["one picture"] == counter.get_total_flops()
    assert told["backward pass"] == 2 * forward
    assert told["blocks computed again"] == counter.get_total_flops() - 3 * forward
    assert (told["blocks computed again"] > 0) == checkpointing
    assert told["one update"] == 30 * told["one picture"], "2 pictures at a time, 3 times, on 5 devices"
    assert told["the training"] == 7 * told["one update"]


@pytest.mark.parametrize("kinds", ["full", "paper", ("conv", "row", "column")])
def test_flops_of_drawing_are_those_that_torch_counts(kinds):
    config = replace(SMALL, patterns=kinds)
    model, tokens = DALLE(config), None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = model.prefill(batch(config, 1)[0])
        for cell in range(42):
            tokens = model.step(tokens, cell, cache).argmax(-1)
    assert count(replace(PLAN, config=config))["flops"]["drawing a picture"] == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing, times", [(False, 3), (True, 4)])
def test_attention_as_executed_and_as_needed(checkpointing, times):
    """A state that reads another takes a product of `width` numbers for the score and one for the value."""
    config = replace(SMALL, patterns=("row", "conv", "full"))
    layout, told = DALLE(config).layout, count(replace(PLAN, config=config, checkpointing=checkpointing))
    pairs = sum(len(layout.keys(state, kind)) for kind in config.patterns for state in range(layout.states))
    assert told["flops"]["its attention, as needed"] == times * 4 * 24 * pairs
    assert told["flops"]["its attention, all x all"] == times * 4 * 24 * 3 * layout.states**2
    without = count(replace(PLAN, config=replace(config, depth=1, patterns="full")))["flops"]
    assert without["its attention, as needed"] == 3 * 4 * 24 * 56 * 57 / 2, "all before it and itself"


def test_patterns_say_how_many_layers_there_are_and_what_they_read():
    config = replace(SMALL, depth=7, patterns="paper")
    layout, told = DALLE(config).layout, count(replace(PLAN, config=config))["patterns"]
    assert {kind: at["layers"] for kind, at in told.items()} == {"row": 4, "column": 2, "conv": 1}
    for kind, at in told.items():
        reads = [len(layout.keys(state, kind)) for state in range(14, 56)]
        assert at["keys"] == pytest.approx(sum(reads) / 42)
    full = count(read("dalle/paper-1.2b", {"model.patterns": "full"}))["patterns"]
    assert full == {"full": {"layers": 64, "keys": 257 + 1025 / 2}}


# -------------------------------------------------------------------------------------------------------- the settings


def test_settings_without_a_value_are_those_of_a_training():
    signatures = {"model": LitDALLE, "data": TokenData, "trainer": Trainer, "optimiser": Optimiser}
    signatures |= {"image_first": ImageFirst}
    for key, told in SETTINGS.items():
        room, name = key.split(".")[-2:]
        default = inspect.signature(signatures[room]).parameters[name].default
        if default is not inspect.Parameter.empty and (key.split(".")[0], default) != ("trainer", None):
            assert default == told, key
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.precision == SETTINGS["trainer.precision"] and trainer.num_devices == 1
    assert trainer.accumulate_grad_batches == SETTINGS["trainer.accumulate_grad_batches"]


def test_sizes_come_from_the_config_then_the_tokens_then_the_paper(tiny_tokens, tmp_path):
    sizes = {"vocab_text": 30, "text_length": 7, "vocab_image": 9, "grid": [2, 3]}
    tokens = {"data.tokens": str(tiny_tokens)}

    def told(changes):
        plan = read("dalle/demo", changes)
        return [getattr(plan.config, name) for name in sizes], plan.sizes_from

    assert told({**tokens, "model.expects": sizes}) == ([30, 7, 9, (2, 3)], "model.expects")
    prepared = Prepared(tiny_tokens).sizes
    assert told(tokens) == ([getattr(prepared, name) for name in sizes], f"the tokens in {tiny_tokens}")
    assert told({}) == ([getattr(PAPER, name) for name in sizes], "the paper: there are no tokens in runs/demo/tokens")


def test_tokens_of_the_config_that_are_not_there_yet_are_told_beside_the_numbers(tmp_path, capsys):
    own, nowhere = tmp_path / "own.yaml", tmp_path / "tokens"
    for data, why in (({"tokens": str(nowhere)}, f": there are no tokens in {nowhere}"), ({}, "")):
        own.write_text(yaml.safe_dump({"model": {"depth": 1, "width": 8, "heads": 1}, "data": data,
                                       "trainer": {"max_steps": 1}}))  # fmt: skip
        assert main(["describe", str(own)]) == 0
        said = capsys.readouterr()
        assert said.err == (
            f"warning: these are the sizes of the paper{why}\n"
            "hint: prepare the tokens first, or set model.expects\n"
        )  # fmt: skip
        assert f"256 text ids of 16,384, 32 x 32 image tokens of 8,192: sizes of the paper{why}\n" in said.out
    assert main(["describe", "dalle/paper-1.2b"]) == 0
    assert capsys.readouterr().err == "", "expects says them"


@pytest.mark.parametrize("content", [None, "{}", "{", '{"sizes": {"grid": [4, 4]}}'])
def test_tokens_that_were_named_must_be_there(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "prepared.json").write_text(content)
    assert main(["describe", "dalle/demo", "--data.tokens", str(tmp_path)]) == DataError.code == 3
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path} holds no prepared tokens\nhint: make them with dalle prepare\n"
    assert said.out == ""
    expects = "{vocab_text: 9, text_length: 2, vocab_image: 5, grid: [2, 2]}"
    assert main(["describe", "dalle/demo", "--data.tokens", str(tmp_path), "--model.expects", expects]) == 0


def test_the_config_that_a_run_has_written_can_be_described(tiny_tokens, tmp_path):
    args = ["--config=dalle/demo", f"--run={tmp_path}", f"--data.tokens={tiny_tokens}", "--trainer.accelerator=cpu"]
    args += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *args, "--model.depth=1", "--model.width=16", "--model.heads=2", "--model.prompts=0"]) == 0
    plan = read(str(tmp_path / "config.yaml"))
    assert (plan.config, plan.sizes_from) == (load(tmp_path).model.config, f"the tokens in {tiny_tokens}")
    assert (plan.precision, plan.batch, plan.updates) == ("bf16-mixed", 64, 1)


def test_every_shipped_config_can_be_described():
    for path in CONFIGS.glob("*.yaml"):
        given, plan = yaml.safe_load(path.read_text()), read(f"dalle/{path.stem}")
        assert (plan.config.depth, plan.config.width) == (given["model"]["depth"], given["model"]["width"])
        assert plan.muon == given["model"]["optimiser"]["muon"] and plan.updates == given["trainer"]["max_steps"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_one_screen_and_writes_json(tmp_path, capsys):
    out = tmp_path / "sizes.json"
    assert main(["describe", "dalle/paper-12b", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) <= 32 and max(map(len, lines[:-1])) <= 100 and lines[-1] == f"wrote {out}"
    for words in (
        "64 blocks of width 3,968, 62 heads x 64",
        "256 text ids of 16,384, 32 x 32 image tokens of 8,192: sizes of model.expects",
        "430,000 updates of 1,024 pictures: batch_size 4 x accumulate 256 x devices 1",
        "memory of one device, bf16-mixed",
    ):
        assert words in said
    plan = read("dalle/paper-12b")
    told = json.loads(out.read_text())
    assert told == {"config": "dalle/paper-12b", **json.loads(json.dumps(count(plan)))}
    assert re.search(r"^all +12\.29 B$", said, re.MULTILINE) and "weights  " in said
    for kind, layers in (("row", 47), ("column", 16), ("conv", 1)):
        assert re.search(rf" {kind} +{layers} +{told['patterns'][kind]['keys']:.1f}$", said, re.MULTILINE)
    assert f"{told['memory']['all'] / 2**30:.2f} GiB" in said
    assert f"{told['flops']['one picture'] / 1e12:.2f} TFLOP" in said


def test_settings_are_changed_in_the_spelling_of_a_config(tmp_path):
    out, own = tmp_path / "told.json", tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"model": {"depth": 2, "width": 32, "heads": 4}, "trainer": {"max_steps": 3}}))
    changes = ["--model.width=64", "--model.patterns", "[row, conv]", "--model.optimiser.muon", "true"]
    changes += ["--model.optimiser.ema=null", "--data.batch_size", "3", "--trainer.devices=8", "--trainer.num_nodes=2"]
    changes += ["--trainer.precision", "bf16-mixed", "--model.expects.grid", "[4, 5]", "--model.expects.vocab_text=99"]
    changes += ["--model.expects.text_length=6", "--model.expects.vocab_image=11", "--model.checkpointing", "true"]
    assert main(["describe", str(own), "--out", str(out), *changes]) == 0
    config = DALLEConfig(99, 6, 11, (4, 5), 2, 64, 4, patterns=("row", "conv"))
    plan = Plan(config, "model.expects", True, True, False, "bf16-mixed", 3, 1, 16, updates=3)
    assert json.loads(out.read_text()) == {"config": str(own), **json.loads(json.dumps(count(plan)))}
    assert "batch_size 3 x accumulate 1 x devices 16" in "\n".join(page(plan, count(plan)))


@pytest.mark.parametrize(
    "given, precision",
    [("32", "32-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed"), ("null", "32-true"), ("16-mixed", "16-mixed")],
)
def test_precisions_as_a_training_takes_them(given, precision):
    """Read as on the command line; Lightning agrees, where it needs no GPU."""
    _, settings = dotted(["--trainer.precision", given])
    assert read("dalle/demo", settings).precision == precision
    if precision != "16-mixed":
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        assert Trainer(accelerator="cpu", precision=settings["trainer.precision"], **quiet).precision == precision


@pytest.mark.parametrize("given, devices", [("-1", 1), ("auto", 1), ("1", 1), ("4", 4)])
def test_all_devices_of_a_machine_are_one_here(given, devices):
    assert read("dalle/demo", dotted([f"--trainer.devices={given}", "--trainer.num_nodes=3"])[1]).devices == 3 * devices


@pytest.mark.parametrize("given, averaged", [("null", False), ("0", True), ("0.5", True), ("1e-3", True)])
def test_averaged_weights_are_held_where_they_have_a_decay(given, averaged):
    assert read("dalle/demo", dotted(["--model.optimiser.ema", given])[1]).averaged == averaged


def test_settings_that_change_nothing_are_named_and_change_nothing(capsys):
    assert main(["describe", "dalle/paper-1.2b"]) == 0
    plain = capsys.readouterr().out
    changes = ["--model.optimiser.clip=4", "--data.workers", "0", "--model.optimiser.learning_rate.warmup", "50"]
    changes += ["--trainer.accelerator", "cpu", "--model.optimiser", "{eps: 1.0e-6}"]
    assert main(["describe", "dalle/paper-1.2b", *changes]) == 0
    line = (
        "of no effect on these numbers: model.optimiser.clip, data.workers, model.optimiser.learning_rate.warmup, "
        "trainer.accelerator, model.optimiser.eps\n"
    )
    said = capsys.readouterr()
    assert line in said.out and said.out.replace(line, "") == plain and said.err == ""


def test_settings_of_a_group_count_as_if_given_one_by_one():
    both = read("dalle/demo", {"model.optimiser": {"ema": None, "muon": False, "clip": 3}, "data.batch_size": 5})
    single = {"model.optimiser.ema": None, "model.optimiser.muon": False, "data.batch_size": 5}
    assert both == replace(read("dalle/demo", single), idle=("model.optimiser.clip",))
    assert not both.averaged and read("dalle/demo").averaged


WHOLE = "give a whole number from 1 on here, such as"


@pytest.mark.parametrize(
    "mistake, what, hint",
    [
        ("dvae/demo", "dvae/demo does not say model.depth", "give a config of stage 2, such as dalle/demo"),
        ("model.optimiser.ema abc", "model.optimiser.ema is 'abc'", "give a number from 0 to below 1, such as 0.999"),
        ("model.optimiser.ema 1", "model.optimiser.ema is 1", "give a number from 0 to below 1, such as 0.999, or nu"),
        ("model.optimiser.ema [0.9]", "model.optimiser.ema is [0.9]", "give a number from 0 to below 1, such as 0.999"),
        ("model.optimiser null", "model.optimiser is no single setting of a training", "what counts here: model.depth"),
        ("mdel.width 8", "mdel.width is no single setting of a training", "what counts here: model.depth, model.width"),
        ("dalle/nosuch", "there is no config dalle/nosuch", "give a path, or one of the shipped names: dalle/cifar10"),
        ("model.heads 7", "width 192 cannot be shared by 7 heads", "choose a multiple of heads, such as 196"),
        ("model.checkpointing 3", "model.checkpointing is 3", "give true or false"),
        ("model.expects.grid [4,4]", "model.expects is {'grid': [4, 4]}", "give just vocab_text, text_length, vocab_i"),
        ("model.expects {grid:4}", "model.expects is {'grid:4': None}", "give just vocab_text, text_length, vocab_i"),
        ("model.expects.grid 4", "model.expects is {'grid': 4}", "give just vocab_text, text_length, vocab_image, gr"),
        ("trainer.precision [32]", "trainer.precision is [32]", "known here: 32-true, bf16-mixed, 16-mixed"),
        ("data.batch_size 0", "data.batch_size is 0", f"{WHOLE} --data.batch_size 1"),
        ("trainer.devices [0,1]", "trainer.devices is [0, 1]", f"{WHOLE} --trainer.devices 1"),
        ("trainer.max_steps -1", "trainer.max_steps is -1", f"{WHOLE} --trainer.max_steps 1"),
        ("model.depth [", "depth is '['", "depth needs whole numbers from 1 on"),
        ("model.depth", "--model.depth has no value", "give one, such as --model.depth 1"),
        ("trainer.precision 8", "trainer.precision is 8", "known here: 32-true, bf16-mixed, 16-mixed"),
    ],
)
def test_mistakes_are_told_in_two_lines(mistake, what, hint, capsys):
    name, *value = mistake.split()
    args = [name] if "/" in name else ["dalle/demo", f"--{name}", *value]
    assert main(["describe", *args]) == UserError.code
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first == f"error: {what}" and second.startswith(f"hint: {hint}") and said.out == ""


def test_a_model_beyond_all_measure(capsys):
    assert main(["describe", "dalle/demo", "--model.width", "1000000000", "--model.heads", "1"]) == UserError.code
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        "error: no tensor can be so large: vocab_text 16384, text_length 256, vocab_image 8192, grid (32, 32), "
        "depth 4, width 1000000000, heads 1, mlp_ratio 4, patterns full, both_orders False\nhint: give smaller sizes\n"
    )


def test_a_folder_in_place_of_a_file_for_the_numbers(tmp_path, capsys):
    assert main(["describe", "dalle/demo", "--out", str(tmp_path)]) == UserError.code
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"error: {tmp_path} is a folder\nhint: name a file, such as --out {tmp_path / 'sizes.json'}\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe", b"", b"[1, 2]", b"model: 3"])
def test_files_that_are_no_config(content, tmp_path, capsys):
    (tmp_path / "own.yaml").write_bytes(content)
    assert main(["describe", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "out.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "own.yaml" in first and "stage 2" in second and not (tmp_path / "out.json").exists()
