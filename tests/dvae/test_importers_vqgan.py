"""VQGAN checkpoints of taming-transformers: files of their layout, written here, against the published description."""

import re
import sys
import types
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from dvae import files
from dvae.__main__ import main
from dvae.artefact import verify
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import load
from dvae.vqgan import VQGANConfig

CODES, WIDTH, BLOCKS, SIDE = 40, 32, 1, 32
SHAPES = {  # by kind of quantizer: multipliers, levels with attention, channels of the latent, width of the codes
    "nearest": ((1, 2, 1, 2), (1, 3), 12, 8),
    "gumbel": ((1, 1, 2), (2,), 16, 16),
}
KINDS = pytest.mark.parametrize("kind", SHAPES)


# ------------------------------------------------------------------------------------------------------ such files


def weights_of(kind: str) -> OrderedDict:
    """A state dict with the keys and shapes of the release, in its order; the numbers are random."""
    multipliers, attended, latent, code_width = SHAPES[kind]
    generator, state = torch.Generator().manual_seed(5), OrderedDict()

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    def conv(name, inputs, outputs, kernel):
        state[f"{name}.weight"] = random(outputs, inputs, kernel, kernel, scale=(inputs * kernel**2) ** -0.5)
        state[f"{name}.bias"] = random(outputs, scale=0.1)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width, scale=0.2), random(width, scale=0.1)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def level(name, inputs, outputs, blocks, attended):
        for k in range(blocks):
            block(f"{name}.block.{k}", outputs if k else inputs, outputs)
        for k in range(blocks if attended else 0):
            attention(f"{name}.attn.{k}", outputs)

    def middle(name, width):
        block(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        block(f"{name}.mid.block_2", width, width)

    widths, last = [WIDTH * m for m in multipliers], len(multipliers) - 1
    conv("encoder.conv_in", 3, WIDTH, 3)
    for k, width in enumerate(widths):
        level(f"encoder.down.{k}", widths[k - 1] if k else WIDTH, width, BLOCKS, k in attended)
        if k < last:
            conv(f"encoder.down.{k}.downsample.conv", width, width, 3)
    middle("encoder", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], latent, 3)
    conv("decoder.conv_in", latent, widths[-1], 3)
    middle("decoder", widths[-1])
    for k, width in enumerate(widths):
        level(f"decoder.up.{k}", widths[min(k + 1, last)], width, BLOCKS + 1, k in attended)
        if k:
            conv(f"decoder.up.{k}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", WIDTH)
    conv("decoder.conv_out", WIDTH, 3, 3)
    conv("loss.discriminator.main.0", 3, 4, 4)
    state["loss.perceptual_loss.scaling_layer.shift"] = random(1, 3, 1, 1)
    conv("loss.perceptual_loss.net.slice1.0", 3, 4, 3)
    if kind == "gumbel":
        conv("quantize.proj", latent, CODES, 1)
    state[f"quantize.{'embed' if kind == 'gumbel' else 'embedding'}.weight"] = random(CODES, code_width)
    conv("quant_conv", latent, code_width, 1)
    conv("post_quant_conv", code_width, latent, 1)
    return state


def lightning(state, monkeypatch) -> dict:
    """What Lightning of that time saves: a callback's state under its class, and an optimiser's twice the weights."""
    room = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    room.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": room.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, room.__name__, room)
    best = {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.3), "best_model_path": "a.ckpt"}
    adam = {0: {"step": 7, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}}
    groups = [{"lr": 4.5e-6, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "params": [0]}]
    return {
        "epoch": 3, "global_step": 2**33, "pytorch-lightning_version": "1.0.8", "state_dict": state,
        "callbacks": {room.ModelCheckpoint: best}, "lr_schedulers": [],
        "optimizer_states": [{"state": adam, "param_groups": groups}],
    }  # fmt: skip


def configured(content, monkeypatch) -> dict:
    """The same with hyperparameters, as OmegaConf keeps them."""
    rooms = {name: types.ModuleType(f"omegaconf.{name}") for name in ("dictconfig", "listconfig", "nodes", "base")}
    kinds = {"DictConfig": "dictconfig", "ListConfig": "listconfig", "AnyNode": "nodes", "ContainerMetadata": "base",
             "Metadata": "base"}  # fmt: skip
    for kind, room in kinds.items():
        setattr(rooms[room], kind, type(kind, (), {"__module__": f"omegaconf.{room}"}))
    for module in (types.ModuleType("omegaconf"), *rooms.values()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    tree = rooms["dictconfig"].DictConfig()
    for name, kind in (("multipliers", rooms["listconfig"].ListConfig()), ("width", rooms["nodes"].AnyNode())):
        about = rooms["base"].Metadata()
        about.ref_type, about.object_type, about.optional = int, list, True
        kind._parent, kind._metadata, kind._content = tree, about, [128]
        setattr(tree, name, kind)
    return content | {"hyper_parameters": tree}


LAYOUTS = ("lightning", "omegaconf", "legacy", "state dict", "safetensors")


def write(layout, state, folder, monkeypatch):
    """The path of a file of this layout."""
    if layout == "safetensors":
        safetensors.torch.save_file(state, folder / "vqgan.safetensors")
        return folder / "vqgan.safetensors"
    content = state if layout == "state dict" else lightning(state, monkeypatch)
    content = configured(content, monkeypatch) if layout == "omegaconf" else content
    torch.save(content, folder / "last.ckpt", _use_new_zipfile_serialization=layout != "legacy")
    monkeypatch.undo()
    return folder / "last.ckpt"


def imported(path, out, side=SIDE) -> int:
    return main(["import", "vqgan", str(path), "--out", str(out), "--image_size", str(side)])


# ------------------------------------------------------------------------------------------- what they compute


class Reference:
    """The published description, on a state dict of the release."""

    def __init__(self, state, kind):
        self.state, self.kind = state, kind

    def conv(self, name, x, padding=None, stride=1):
        w = self.state[f"{name}.weight"]
        return F.conv2d(x, w, self.state[f"{name}.bias"], stride, w.shape[-1] // 2 if padding is None else padding)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def swish(self, x):
        return x * torch.sigmoid(x)

    def block(self, name, x):
        y = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", y)))
        return (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x) + y

    def attention(self, name, x):
        if f"{name}.q.weight" not in self.state:
            return x
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        shares = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)  # of j in i
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", shares, v).view(x.shape))

    def level(self, name, x, blocks):
        for k in range(blocks):
            x = self.attention(f"{name}.attn.{k}", self.block(f"{name}.block.{k}", x))
        return x

    def middle(self, name, x):
        x = self.attention(f"{name}.mid.attn_1", self.block(f"{name}.mid.block_1", x))
        return self.block(f"{name}.mid.block_2", x)

    def end(self, name, x):
        return self.conv(f"{name}.conv_out", self.swish(self.norm(f"{name}.norm_out", x)))

    def encoded(self, images):
        """Images in [0, 1] -> what stands for the cells, before a code is chosen."""
        levels = len(SHAPES[self.kind][0])
        x = self.conv("encoder.conv_in", 2 * images - 1)
        for k in range(levels):
            x = self.level(f"encoder.down.{k}", x, BLOCKS)
            if k < levels - 1:
                x = self.conv(f"encoder.down.{k}.downsample.conv", F.pad(x, (0, 1, 0, 1)), padding=0, stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)))

    def logits(self, z):
        if self.kind == "gumbel":
            return self.conv("quantize.proj", z)
        codes = self.state["quantize.embedding.weight"]
        return -(z[:, None] - codes[None, :, :, None, None]).square().sum(2)

    def painted(self, tokens):
        codes = self.state["quantize.embed.weight" if self.kind == "gumbel" else "quantize.embedding.weight"]
        x = self.conv("post_quant_conv", codes[tokens].movedim(3, 1))
        x = self.middle("decoder", self.conv("decoder.conv_in", x))
        for k in reversed(range(len(SHAPES[self.kind][0]))):
            x = self.level(f"decoder.up.{k}", x, BLOCKS + 1)
            if k:
                x = self.conv(f"decoder.up.{k}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return (self.end("decoder", x).clamp(-1, 1) + 1) / 2


def levelled(kind):
    """Weights of the release with which random pictures use many codes."""
    state, images = weights_of(kind), torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    reference = Reference(state, kind)
    z = reference.encoded(images)
    if kind == "gumbel":
        state["quantize.proj.weight"] *= 4
        state["quantize.proj.bias"] -= reference.logits(z).mean((0, 2, 3))
    else:
        cells = z.movedim(1, 3).flatten(0, 2)
        picked = torch.randperm(len(cells), generator=torch.Generator().manual_seed(2))[:CODES]
        state["quantize.embedding.weight"] = cells[picked].clone()
    return state


@pytest.fixture(scope="module")
def published():
    with torch.inference_mode(False), torch.no_grad():
        return {kind: levelled(kind) for kind in SHAPES}


@KINDS
@pytest.mark.parametrize("side", [SIDE, 48])
@torch.inference_mode()
def test_it_computes_what_the_published_description_says(kind, side, published, tmp_path, monkeypatch):
    assert imported(write("lightning", published[kind], tmp_path, monkeypatch), tmp_path / "run", side) == 0
    model, reference = load(tmp_path / "run"), Reference(published[kind], kind)
    multipliers, attention, latent, code_width = SHAPES[kind]
    assert model.config == VQGANConfig(side, CODES, WIDTH, multipliers, BLOCKS, attention, latent, code_width, kind)
    images = torch.rand(3, 3, side, side)
    logits = reference.logits(reference.encoded(images))
    tokens = logits.argmax(1)
    cells = side // 2 ** (len(multipliers) - 1)
    assert model.grid == (cells, cells) and len(tokens.unique()) > 10
    torch.testing.assert_close(model.logits(images), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.encode(images), tokens)
    pictures = reference.painted(tokens)
    assert pictures.std() > 0.1
    torch.testing.assert_close(model.decode(tokens), pictures, rtol=0, atol=1e-5)


def test_all_layouts_give_the_same_model(published, tmp_path, monkeypatch):
    digests = set()
    for layout in LAYOUTS:
        assert imported(write(layout, published["gumbel"], tmp_path, monkeypatch), tmp_path / layout) == 0
        digests.add(verify(tmp_path / layout / "model")["digest"])
    assert len(digests) == 1
    assert not any(name.startswith(("pytorch_lightning", "omegaconf")) for name in sys.modules)


def test_weights_without_their_loss_and_in_half_precision(published, tmp_path, monkeypatch, capsys):
    state = {key: tensor.half() for key, tensor in published["nearest"].items() if not key.startswith("loss.")}
    assert imported(write("state dict", state, tmp_path, monkeypatch), tmp_path / "run") == 0
    assert "left out" not in capsys.readouterr().out
    assert verify(tmp_path / "run" / "model")["about"]["left_out"] == []
    codes = load(tmp_path / "run").codes()
    assert codes.dtype == torch.float32 and torch.equal(codes, state["quantize.embedding.weight"].float())


def test_what_is_written_and_said(published, tmp_path, monkeypatch, capsys):
    path, run = write("lightning", published["nearest"], tmp_path, monkeypatch), tmp_path / "run"
    assert imported(path, run) == 0
    assert capsys.readouterr().out == (
        f"wrote {run / 'model'}: 32 x 32 pixels <-> 4 x 4 cells of 40 codes\n"
        f"next: dvae reconstruct {run} IMAGES --out pictures\n"
        f"      dalle prepare IMAGES --dvae {run} --out tokens\n"
        "left out, for only its training needs them: 5 tensors of loss.discriminator, loss.perceptual_loss\n"
    )
    about = verify(run / "model")["about"]
    assert about["checkpoint"] == {"file": "last.ckpt", "sha256": files.sha256_file(path)}
    assert about["left_out"] == ["loss.discriminator", "loss.perceptual_loss"]
    assert "CompVis/taming-transformers" in about["imported"] and "MIT" in about["licence"]


# ------------------------------------------------------------------------------------------------------ mistakes


def refused(capsys, path, out, code=4, side=SIDE) -> tuple[str, str]:
    """Runs a mistake, which writes nothing; returns its two lines without their first words."""
    assert imported(path, out, side) == code
    said = capsys.readouterr()
    match = re.fullmatch(r"error: (.+)\nhint: (.+)\n", said.err)
    assert match and said.out == "" and not out.exists(), said.err
    return match.groups()


NO_VQGAN = "is no VQGAN of taming-transformers: "
OF_IT = "give a checkpoint or a state dict of its VQModel or GumbelVQ"
FETCH = "fetch the file again from those who published it, and compare its size with theirs"
RELEASE = "give a file of the release that you have named"


@pytest.mark.parametrize(
    "change, what, hint",
    [
        (lambda s: s.pop("encoder.conv_in.weight"),
         " " + NO_VQGAN + "it has no weights encoder.conv_in.weight of 4 dimensions", OF_IT),
        (lambda s: s.pop("quantize.embedding.weight"),
         " " + NO_VQGAN + "it has no weights quantize.embedding.weight of 2 dimensions", OF_IT),
        (lambda s: s.update({"quantize.proj.weight": torch.zeros(40, 8, 1, 1)}),
         " " + NO_VQGAN + "it has no weights quantize.embed.weight of 2 dimensions", OF_IT),
        (lambda s: [s.pop(key) for key in list(s) if ".down." in key],
         " " + NO_VQGAN + "its levels have [] channels, and its first convolution has 32", OF_IT),
        (lambda s: s.update({"encoder.down.77.block.0.conv1.weight": torch.zeros(1)}),
         " " + NO_VQGAN + "it has no weights encoder.down.4.block.0.conv1.weight of 4 dimensions", OF_IT),
        (lambda s: s.update({f"encoder.down.{k}.block.0.conv1.weight": torch.zeros(32, 1, 1, 1) for k in range(13)}),
         " " + NO_VQGAN + f"its levels have {[32] * 13} channels, and its first convolution has 32", OF_IT),
        (lambda s: s.update({f"encoder.down.0.block.{k}.x": torch.zeros(1) for k in range(1000)}),
         " " + NO_VQGAN + "1249 tensors are too few for 4 levels of 1000 blocks", OF_IT),
        (lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}),
         " " + NO_VQGAN + "its levels have [32, 48, 32, 64] channels, and its first convolution has 32", OF_IT),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)}),
         " " + NO_VQGAN + "hidden is 16, which the 32 groups of its normalisation do not divide", OF_IT),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(32, 12, 3, 3)}),
         ": encoder.conv_in.weight has the shape (32, 12, 3, 3), and (32, 3, 3, 3) fits the others", RELEASE),
        (lambda s: s.pop("decoder.up.1.attn.1.q.bias"), " lacks decoder.up.1.attn.1.q.bias", RELEASE),
        (lambda s: s.update({"quantize.used": torch.zeros(3)}), " has unknown keys: quantize.used", RELEASE),
        (lambda s: s.update({"lossy": torch.zeros(1)}), " has unknown keys: lossy", RELEASE),
        (lambda s: s.update({"quant_conv.weight": torch.zeros(8, 24, 1, 1)}),
         ": quant_conv.weight has the shape (8, 24, 1, 1), and (8, 12, 1, 1) fits the others", RELEASE),
        (lambda s: s["quant_conv.bias"].fill_(torch.nan), ": quant_conv.bias holds values that are not finite", FETCH),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(8).long()}),
         ": quant_conv.bias is of the type int64", "give a file with float32 or float16 weights"),
        (lambda s: s.update(epoch=3), " holds neither a module nor a state dict", FETCH),
    ],
    ids=range(17),
)  # fmt: skip
def test_checkpoints_that_do_not_fit(change, what, hint, published, tmp_path, monkeypatch, capsys):
    state = OrderedDict((key, tensor.clone()) for key, tensor in published["nearest"].items())
    change(state)
    path = write("lightning", state, tmp_path, monkeypatch)
    assert refused(capsys, path, tmp_path / "run") == (f"{path}{what}", hint)


def test_a_tokenizer_of_another_kind(tmp_path, capsys):
    config = DVAEConfig(image_size=8, vocab_size=4, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=3, kernel=4,
                        patch=4)  # fmt: skip
    torch.save(DVAE(config).state_dict(), tmp_path / "dvae.pt")
    said = refused(capsys, tmp_path / "dvae.pt", tmp_path / "run")
    assert said == (f"{tmp_path / 'dvae.pt'} {NO_VQGAN}it has no weights encoder.conv_in.weight of 4 dimensions", OF_IT)


def test_another_callback_is_not_even_looked_up(published, tmp_path, monkeypatch, capsys):
    content = lightning(published["nearest"], monkeypatch)
    room = types.ModuleType("main")
    room.Logger = type("Logger", (), {"__module__": "main"})
    monkeypatch.setitem(sys.modules, "main", room)
    content["callbacks"][room.Logger] = {}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    what, _ = refused(capsys, tmp_path / "last.ckpt", tmp_path / "run")
    assert what.endswith("last.ckpt was not read: it names main.Logger, which no checkpoint of this kind needs")


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_a_checkpoint_that_is_cut(quarter, published, tmp_path, monkeypatch, capsys):
    path = write("lightning", published["gumbel"], tmp_path, monkeypatch)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * quarter // 4])
    said = refused(capsys, path, tmp_path / "run")
    assert said == (f"{path} is damaged: it was cut or changed since it was written", FETCH)


@pytest.mark.parametrize("side, what", [(20, "image_size 20 is not a multiple of the downsampling factor 8"),
                                        (0, "image_size is 0")])  # fmt: skip
def test_a_picture_size_that_does_not_fit(side, what, published, tmp_path, monkeypatch, capsys):
    path = write("state dict", published["nearest"], tmp_path, monkeypatch)
    assert refused(capsys, path, tmp_path / "run", 2, side)[0] == what


def test_a_run_that_is_not_empty(published, tmp_path, monkeypatch, capsys):
    path = write("state dict", published["nearest"], tmp_path, monkeypatch)
    assert imported(path, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not empty\n")
    assert list(tmp_path.iterdir()) == [path]
