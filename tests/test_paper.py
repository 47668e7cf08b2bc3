"""notebooks/paper.md tells the truth: every setting, line and test that it names is there and says what it says.

    python tests/test_paper.py      # writes the numbers of the lines into the page anew

At the end stand tests of those facts that are spread over several rooms, and so at home in none.
"""

import ast
import functools
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dvae.optim import Optimiser
from dvae.schedules import Schedule

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "notebooks" / "paper.md"

FACTS = ["the paper", "here", "the line that does it", "the test that proves it", "what differs, and why"]
MISSING = ["the paper", "why it is not built"]
OBSERVED = ["the paper", "what there is of it here"]
MEASURED = ["choice", "measured"]
RULE = re.compile(r"[|\- ]+")

# `dvae/paper: model.kl_weight.end = 6.6`
SETTING = re.compile(r"`([\w./*-]+): ([\w.]+) = ([^`]+)`")
# [a/b.py:7](../a/b.py#L7) `what to look for`
CODE = re.compile(r"\[([\w./-]+):(\d+)\]\(\.\./([\w./-]+)#L(\d+)\) `([^`]+)`")
# [test_b.py:7](../tests/test_b.py#L7 "tests/test_b.py::test_c")
TEST = re.compile(r'\[([\w.]+):(\d+)\]\(\.\./(tests/[\w./]+)#L(\d+) "([\w./]+)::(\w+)"\)')
ALWAYS = "always"  # in place of a setting where there is nothing to set
SILENT = "*Not said:*"  # begins a row of what neither the paper nor its code says


def tables(page: str) -> Iterator[tuple[list[str], int, list[str]]]:
    """(header, line number, cells) of each row of the page's tables."""
    header = None
    for number, line in enumerate(page.splitlines(), start=1):
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
        elif not RULE.fullmatch(line):
            yield header, number, cells


def faults(page: str) -> Iterator[str]:
    """What is not so, as sentences."""
    for header, number, cells in tables(page):
        if header not in (FACTS, MISSING, OBSERVED, MEASURED):
            yield f"line {number} stands in a table with other columns: {header}"
        elif len(cells) != len(header):
            yield f"line {number} has {len(cells)} cells, not {len(header)}"
        elif not all(cells[:4]):
            yield f"line {number} leaves a cell empty"
        elif header == FACTS:
            if cells[0].startswith(SILENT) and not cells[4]:
                yield f"line {number} does not say what was chosen, and why"
            checks = ((SETTING, setting_fault), (CODE, code_fault), (TEST, proof_fault))
            for cell, (pattern, fault) in zip(cells[1:4], checks, strict=True):
                if re.sub(r"<br>|\s", "", pattern.sub("", cell)) and (pattern, cell) != (SETTING, ALWAYS):
                    yield f"line {number}: cannot read {cell!r}"
                for match in pattern.finditer(cell):
                    if found := fault(*match.groups()):
                        yield f"line {number}: {found}"


@functools.cache
def setting_fault(name: str, key: str, said: str) -> str | None:
    """Settings are compared as YAML; a name with a star stands for several configs that agree."""
    paths = sorted((ROOT / "configs").glob(f"{name}.yaml"))
    if not paths:
        return f"there is no config {name}"
    for path in paths:
        value = yaml.safe_load(path.read_text())
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return f"{path.stem} has no {key}"
            value = value[part]
        if value != yaml.safe_load(said) or type(value) is not type(yaml.safe_load(said)):
            return f"{key} of {path.stem} is {value}, not {said}"
    return None


@functools.cache
def lines(name: str) -> list[str]:
    """Of a file of the repository; none where there is no such file."""
    path = ROOT / name
    return path.read_text().splitlines() if path.is_file() else []


@functools.cache
def functions(name: str) -> list[tuple[str, int]]:
    """Names and lines of the functions of a module."""
    found = [node for node in ast.parse("\n".join(lines(name))).body if isinstance(node, ast.FunctionDef)]
    return [(node.name, node.lineno) for node in found]


def lines_with(name: str, snippet: str) -> list[int]:
    return [number for number, line in enumerate(lines(name), start=1) if snippet in line]


def lines_of_test(name: str, test: str) -> list[int]:
    return [number for function, number in functions(name) if function == test]


def code_fault(shown: str, line: str, name: str, anchor: str, snippet: str) -> str | None:
    found = lines_with(name, snippet)
    if len(found) != 1:
        return f"{snippet!r} stands {len(found)} times in {name}, not once"
    return place_fault(name, found[0], name, (shown, line, name, anchor))


def proof_fault(shown: str, line: str, name: str, anchor: str, file: str, test: str) -> str | None:
    found = lines_of_test(file, test)
    if len(found) != 1 or not test.startswith("test_"):
        return f"there is no {test} in {file}"
    return place_fault(file, found[0], file.split("/")[-1], (shown, line, name, anchor))


def place_fault(name: str, line: int, shown: str, link: tuple[str, str, str, str]) -> str | None:
    if link == (shown, str(line), name, str(line)):
        return None
    return f"it stands in {name}:{line}, not {link[2]}:{link[3]}: run python tests/test_paper.py"


def renumbered(page: str) -> str:
    """The page with the lines where the snippets and the tests stand; what is not found once is left as it is."""

    def code(match: re.Match) -> str:
        *_, name, _, snippet = match.groups()
        found = lines_with(name, snippet)
        return f"[{name}:{found[0]}](../{name}#L{found[0]}) `{snippet}`" if len(found) == 1 else match.group()

    def proof(match: re.Match) -> str:
        *_, file, test = match.groups()
        found = lines_of_test(file, test)
        if len(found) != 1:
            return match.group()
        return f'[{file.split("/")[-1]}:{found[0]}](../{file}#L{found[0]} "{file}::{test}")'

    return TEST.sub(proof, CODE.sub(code, page))


# ------------------------------------------------------------------------------------------------------------- the page


def test_every_fact_of_the_page_is_so():
    assert list(faults(PAGE.read_text())) == []


def test_the_page_is_whole():
    rows = list(tables(PAGE.read_text()))
    assert sum(header == FACTS for header, *_ in rows) >= 100 and sum(header == MISSING for header, *_ in rows) >= 5
    assert sum(header == OBSERVED for header, *_ in rows) >= 5
    assert sum(cells[0].startswith(SILENT) for *_, cells in rows) >= 15
    assert f"\n| {' | '.join(MEASURED)} |\n" in PAGE.read_text()
    for pattern in (SETTING, CODE, TEST):
        assert len(pattern.findall(PAGE.read_text())) >= 50


def test_its_commands_are_real():
    import dalle.__main__
    import dvae.__main__
    from dvae.commands import TRAININGS, find_config

    known = {"dvae": dvae.__main__.COMMANDS, "dalle": dalle.__main__.COMMANDS}
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("dvae ", "dalle "))]
    assert len(lines) >= 5
    for line in lines:
        program, command, *rest = shlex.split(line, comments=True)
        assert {command, " ".join([command, *rest[:1]])} & {*TRAININGS, *known[program]}, line
        for at, word in enumerate(rest):
            if word == "--config":
                find_config(rest[at + 1])


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text())
    assert targets and [target for target in targets if not (PAGE.parent / target).exists()] == []
    headings = re.findall(r"^#+ (.*)", PAGE.read_text(), flags=re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub names them
    named = re.findall(r"\]\(#([^)]+)", PAGE.read_text())
    assert named and set(named) <= places


# --------------------------------------------------------------------------------------------------- the check itself

GOOD = f"""
| {" | ".join(FACTS)} |
|---|---|---|---|---|
| beta | `dvae/paper: model.kl_weight.end = 6.6` | [dvae/a.py:9](../dvae/schedules.py#L9) `def __call__(` | \
[a.py:0](../tests/test_paper.py#L0 "tests/test_paper.py::test_the_page_is_whole") | |
| images are mapped | always | [a:1](../dvae/likelihood.py#L1) `epsilon = 0.1` | \
[a.py:0](../tests/test_paper.py#L0 "tests/test_paper.py::test_its_commands_are_real")<br>\
[a.py:0](../tests/test_paper.py#L0 "tests/test_paper.py::test_its_links_lead_somewhere") | ours is other |

| {" | ".join(MISSING)} |
|---|---|
| 1-6-9 moments | memory is not short |

| {" | ".join(MEASURED)} |
|---|---|
| half a cosine | as a quarter |
"""


def test_lines_are_written_anew():
    assert len(list(faults(GOOD))) == 5  # the places are made up
    page = renumbered(GOOD)
    (at,) = lines_with("dvae/likelihood.py", "epsilon = 0.1")
    assert f"[dvae/likelihood.py:{at}](../dvae/likelihood.py#L{at}) `epsilon = 0.1`" in page
    (at,) = lines_with("tests/test_paper.py", "def " + "test_the_page_is_whole")
    assert f'[test_paper.py:{at}](../tests/test_paper.py#L{at} "tests/test_paper.py::test_the_page_is_whole")' in page
    assert list(faults(page)) == [] and renumbered(page) == page


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("= 6.6", "= 6.5", "model.kl_weight.end of paper is 6.6, not 6.5"),
        ("= 6.6", "= '6.6'", "model.kl_weight.end of paper is 6.6, not '6.6'"),
        ("kl_weight.end", "kl_weight.last", "paper has no model.kl_weight.last"),
        ("kl_weight.end", "kl_weight.end.deeper", "paper has no model.kl_weight.end.deeper"),
        ("dvae/paper:", "dvae/papers:", "there is no config dvae/papers"),
        ("dvae/paper: model.kl_weight.end", "dvae/*: model.config.vocab_size", "model.config.vocab_size of cifar10"),
        ("`dvae/paper: model.kl_weight.end = 6.6`", "6.6", "cannot read '6.6'"),
        ("always", "", "leaves a cell empty"),
        ("epsilon = 0.1", "epsilon = 0.2", "stands 0 times in dvae/likelihood.py, not once"),
        ("`epsilon = 0.1`", "`self`", "'self' stands"),
        ("dvae/likelihood.py", "dvae/gone.py", "stands 0 times in dvae/gone.py, not once"),
        ("`epsilon = 0.1`", "epsilon = 0.1", "cannot read"),
        ("test_its_commands_are_real", "test_gone", "there is no test_gone in tests/test_paper.py"),
        ("test_its_commands_are_real", "faults", "there is no faults in tests/test_paper.py"),
        ("tests/test_paper.py::test_the", "tests/test_gone.py::test_the", "no test_the_page_is_whole in tests"),
        ("| ours is other |", "|", "has 4 cells, not 5"),
        ("| memory is not short |", "| |", "leaves a cell empty"),
        ("| as a quarter |", "| |", "leaves a cell empty"),
        ("| beta |", "| *Not said:* beta |", "does not say what was chosen, and why"),
        ("| why it is not built |", "| why |", "stands in a table with other columns"),
    ],
)
def test_what_is_not_so_is_found(old, new, said):
    good = renumbered(GOOD)
    assert old in good
    found = list(faults(renumbered(good.replace(old, new))))
    assert found and said in found[0]


def test_a_line_that_has_moved_is_found():
    good = renumbered(GOOD)
    links = [match.group() for pattern in (CODE, TEST) for match in pattern.finditer(good)]
    assert len(links) == 5
    for link in links:
        for moved in (re.sub(r":(\d+)\]", r":1\1]", link), re.sub(r"#L(\d+)", r"#L1\1", link)):
            (found,) = faults(good.replace(link, moved))
            assert moved != link and found.endswith("run python tests/test_paper.py")


# ----------------------------------------------------------------------------------------- facts of more than one room

SMALL = {"vocab_text": 20, "text_length": 4, "vocab_image": 9, "grid": [2, 3]}
RECIPE = ROOT / "configs" / "dalle" / "paper-12b.yaml"


def stage_2(**settings):
    """A small transformer in its trainer, with the paper's recipe where the settings do not say otherwise."""
    from dalle.train import LitDALLE

    recipe = yaml.safe_load(RECIPE.read_text())["model"]
    kept = {name: recipe[name] for name in ("mlp_ratio", "patterns", "text_weight", "image_weight", "from_codes")}
    optimiser = Optimiser(Schedule(1e-3), ema=None)
    return LitDALLE(**{"depth": 3, "width": 16, "heads": 2, "sizes": SMALL, "optimiser": optimiser} | kept | settings)


def batch_of(rows: int) -> dict:
    ids, tokens = torch.randint(20, (rows, 4)), torch.randint(9, (rows, 2, 3))
    return {"text_ids": ids, "image_tokens": tokens, "keep_text": torch.ones(rows, dtype=torch.bool)}


def test_the_loss_of_stage_2_is_one_eighth_text_and_seven_eighths_image():
    lit, batch = stage_2(), batch_of(5)
    loss, _ = lit.step(batch, update=0, batch_index=0)
    with torch.no_grad():
        logits = lit.model(batch["text_ids"], batch["image_tokens"])
    each = {"text": (logits.text, batch["text_ids"]), "image": (logits.image, batch["image_tokens"].flatten(1))}
    mean = {}
    for part, (predicted, truth) in each.items():
        chances = predicted.double().softmax(-1)
        nats = [-math.log(chances[b, k, truth[b, k]]) for b in range(5) for k in range(truth.shape[1])]
        mean[part] = sum(nats) / len(nats)
    assert abs(mean["text"] - mean["image"]) > 0.1
    assert loss.item() == pytest.approx(mean["text"] / 8 + 7 * mean["image"] / 8, rel=1e-5)


def test_weights_gradients_and_moments_are_float32_under_autocast():
    lit = stage_2()
    inside = set()
    for block in lit.model.blocks:
        block.mlp.hidden.register_forward_hook(lambda _, inputs, output: inside.add(output.dtype))
    adamw = lit.optimiser.build(lit.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = lit.step(batch_of(2), update=0, batch_index=0)
    loss.backward()
    adamw.step()
    kept = {p.dtype for p in lit.model.parameters()} | {p.grad.dtype for p in lit.model.parameters()}
    kept |= {adamw.state[p][name].dtype for p in lit.model.parameters() for name in ("exp_avg", "exp_avg_sq")}
    assert inside == {torch.bfloat16} and kept == {torch.float32}


def test_nothing_is_dropped_in_training():
    """Two passes in training mode and one outside it give the same numbers."""
    model, batch = stage_2().model, batch_of(2)
    inputs = batch["text_ids"], batch["image_tokens"]
    first, again, outside = model.train()(*inputs), model(*inputs), model.eval()(*inputs)
    for part in (0, 1):
        assert torch.equal(first[part], again[part]) and torch.equal(first[part], outside[part])


def test_the_activation_is_nearly_that_of_the_sibling_code():
    """x sigmoid(1.702 x), within 0.021, and exactly GELU in its tanh form."""
    mlp = stage_2().model.blocks[0].mlp.double()
    with torch.no_grad():
        for layer in (mlp.hidden, mlp.out):  # so that the activation alone is left
            torch.nn.init.eye_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        x = torch.linspace(-12, 12, 48_000, dtype=torch.float64).view(-1, 16)
        found = mlp(x)
    assert (found - x * torch.sigmoid(1.702 * x)).abs().max() < 0.021
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(found, x * (1 + torch.tanh(cubic)) / 2, rtol=0, atol=1e-9)


def test_an_image_token_carries_the_row_and_the_column_of_the_cell_that_it_predicts():
    """The states that enter the first block: what is held, plus row and column of the cell, on a grid of 2 x 3."""
    model, batch = stage_2().model, batch_of(1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch["text_ids"], batch["image_tokens"])
    image = seen[0][0, 5:]  # behind the start of the text and 4 ids
    tokens = batch["image_tokens"][0].flatten().tolist()
    held = [model.start[1], *(model.image_embedding.weight[token] for token in tokens[:-1])]
    assert len(image) == 6
    for cell, (state, what) in enumerate(zip(image, held, strict=True)):
        row, column = cell // 3, cell % 3
        expected = what + model.row_position.weight[row] + model.column_position.weight[column]
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-6)


def stage_1(run: Path, **settings):
    """The data of a training of stage 1, of 80 scenes with captions."""
    from dvae.train import ImageData

    data = ImageData("scenes:train:80", image_size=32, **settings)
    data.trainer = SimpleNamespace(default_root_dir=str(run))
    data.setup("fit")
    return data


@pytest.mark.parametrize("augment", [False, True])
def test_stage_1_reads_no_captions(augment, tmp_path, monkeypatch):
    """Batches are the same, and all there is in them, where captions cannot be read; the decoder is given tokens."""
    from dvae import scenes

    rows = [(0, 3), (1, 5)]
    batch = stage_1(tmp_path, augment=augment).train.__getitems__(rows)
    monkeypatch.delattr(scenes, "captions")
    again = stage_1(tmp_path, augment=augment).train.__getitems__(rows)
    assert batch.keys() == again.keys() == {"images", "rows"} and batch["rows"] == again["rows"] == rows
    assert torch.equal(batch["images"], again["images"]) and batch["images"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("by", [{"val_share": 0.2}, {"hold_out": ".*red.*"}])
def test_both_stages_set_the_same_pictures_aside(by, tmp_path, tiny_tokens):
    """Of one source, by the same share or expression; a larger share holds all of a smaller one."""
    from dalle.prepare import Prepared, prepare

    prepare("scenes:train:80", str(tiny_tokens / "dvae"), str(tiny_tokens / "text.json"), str(tmp_path / "out"), **by)
    found, data = Prepared(tmp_path / "out"), stage_1(tmp_path / "run", **by)
    sides = []
    for tokens, pictures in ((found.train, data.train.source), (found.val, data.val.source)):
        captions = [list(pictures.captions(row)) for row in range(len(pictures))]
        assert len(captions) >= 8 and captions == [tokens.captions(row) for row in range(len(tokens))]
        sides.append(captions)
    if "val_share" in by:
        fewer = stage_1(tmp_path / "fewer", val_share=0.1).val.source
        assert 0 < len(fewer) < len(sides[1])
        assert all(list(fewer.captions(row)) in sides[1] for row in range(len(fewer)))


@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_captions_are_dropped_with_the_chance_that_is_set(chance, tiny_tokens):
    from dalle.prepare import Prepared
    from dalle.train import Pairs

    found = Prepared(tiny_tokens)
    pairs = Pairs(found.train, found.text, seed=0, bpe_dropout=0.0, caption_dropout=chance)
    batch = pairs.__getitems__([(epoch, index) for epoch in range(20) for index in range(len(pairs))])
    null = (batch["text_ids"] == found.text.null()).all(1)
    assert torch.equal(null, ~batch["keep_text"])
    rows = len(null)
    error = math.sqrt(chance * (1 - chance) / rows)
    assert rows == 1280 and abs(null.float().mean() - chance) <= 4 * error


if __name__ == "__main__":
    PAGE.write_text(renumbered(PAGE.read_text()))
    for fault in faults(PAGE.read_text()):
        print(fault)
