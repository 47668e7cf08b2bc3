"""Both programs from the outside: exit codes, two lines for every mistake, and nothing half done."""

import json
import shutil

import pytest

from dalle.__main__ import COMMANDS as DALLE_COMMANDS
from dalle.__main__ import main as dalle
from dvae.__main__ import COMMANDS as DVAE_COMMANDS
from dvae.__main__ import main as dvae
from dvae.commands import function
from dvae.images import open_image

PROGRAMS = {"dvae": (dvae, DVAE_COMMANDS), "dalle": (dalle, DALLE_COMMANDS)}


def run(program, args) -> int:
    """The exit code, also where argparse ends the process itself."""
    try:
        return program([str(arg) for arg in args])
    except SystemExit as ending:
        return ending.code or 0


def refused(capsys, program, args, code) -> tuple[str, str]:
    """Runs a mistake; returns its two lines."""
    capsys.readouterr()
    assert run(program, args) == code
    said = capsys.readouterr()
    lines = said.err.rstrip("\n").split("\n")
    assert len(lines) == 2, said.err
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert len(lines[0]) > 12 and len(lines[1]) > 10 and said.out == ""
    return lines[0], lines[1]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_command(name, flag, capsys):
    program, commands = PROGRAMS[name]
    assert run(program, [flag]) == 0
    out = capsys.readouterr().out
    for command in (*commands, "fit", "validate", "test"):
        assert f"{name} {command}" in out
    assert "exit codes" in out


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_command_shows_the_help_and_is_a_mistake(name, capsys):
    assert run(PROGRAMS[name][0], []) == 2
    assert "exit codes" in capsys.readouterr().out


@pytest.mark.parametrize("name, command", [(name, c) for name, (_, commands) in PROGRAMS.items() for c in commands])
def test_help_of_a_command_lists_every_setting(name, command, capsys):
    program, commands = PROGRAMS[name]
    assert run(program, [*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    called = function(commands[command])
    for parameter in called.__annotations__:
        if parameter != "return":
            assert parameter in out
    assert called.__doc__.split()[0] in out


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_the_trainings(name, capsys):
    assert run(PROGRAMS[name][0], ["fit", "--help"]) == 0
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_command(name, capsys):
    what, hint = refused(capsys, PROGRAMS[name][0], ["nonsense"], 2)
    assert "nonsense" in what and f"{name} --help" in hint


@pytest.mark.parametrize("args", [["import"], ["import", "clip"], ["import", "clip", "--help"]], ids=" ".join)
def test_an_import_of_nothing_that_is_known(args, capsys):
    what, hint = refused(capsys, dvae, args, 2)
    assert what == "error: dvae import must be followed by what: openai, vqgan" and hint == "hint: see dvae --help"


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_of_the_first_of_two_words(flag, capsys):
    assert run(dvae, ["import", flag]) == 0
    out = capsys.readouterr().out
    assert "dvae import openai ENCODER DECODER" in out and "dvae import vqgan CHECKPOINT" in out


def test_help_shows_settings_in_dotted_form_and_no_option_of_that_name(capsys):
    assert run(dalle, ["describe", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--model.depth 32 --data.batch_size 1" in " ".join(out.split()) and "--settings" not in out


SIZES = "{vocab_text, text_length, vocab_image, grid} or null"
PLATEAU = "{window, patience, threshold, halvings} or null"
GROUP = "it takes its settings, each by its name"


@pytest.mark.parametrize(
    "setting, value, what",
    [
        ("expects", "{vocab_text: 400}",
         f"model.expects takes {SIZES}: the following arguments are required: text_length, vocab_image, grid"),
        ("expects", "foo", f"model.expects is foo; it takes {SIZES}"),
        ("optimiser.plateau", "true", f"model.optimiser.plateau is true; it takes {PLATEAU}"),
        ("optimiser.plateau", "{windows: 2}",
         f"model.optimiser.plateau is {{'windows': 2}}; it takes {PLATEAU}: Option 'windows' is not accepted"),
        ("optimiser.plateau.window", "x", f"model.optimiser.plateau takes {PLATEAU}: window is x; it takes int"),
        ("optimiser", "{clip: x}", "model.optimiser.clip is x; it takes float or null"),
        ("optimiser.learning_rate.warmup", "x", "model.optimiser.learning_rate.warmup is x; it takes int"),
        ("kl_weight", "null", f"model.kl_weight is null; {GROUP}"),
        ("kl_weight", "-1", f"model.kl_weight is -1; {GROUP}"),
        ("kl_weight", "{start: x}", "model.kl_weight.start is x; it takes float"),
        ("nosuch", "3", "unrecognized arguments: --model.nosuch 3"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_a_training_is_told_by_its_name_its_value_and_what_it_takes(
    setting, value, what, tmp_path, capsys
):
    name = "dvae" if setting == "kl_weight" else "dalle"
    args = ["fit", "--config", f"{name}/demo", "--run", tmp_path, f"--model.{setting}", value]
    told, hint = refused(capsys, PROGRAMS[name][0], args, 2)
    assert told == f"error: {what}" and hint == "hint: --help lists every setting with its meaning"
    assert not list(tmp_path.iterdir())


def test_a_choice_names_every_type(tmp_path, capsys):
    args = ["fit", "--config", "dvae/demo", "--run", tmp_path, "--trainer.logger", "nosuch"]
    what, _, takes = refused(capsys, dvae, args, 2)[0].partition("; it takes ")
    assert what == "error: trainer.logger is nosuch" and takes.endswith(" or null")
    assert {*takes.split(" or ")} == {"Logger", "Iterable[Logger]", "bool", "null"}
    what = refused(capsys, dvae, [*args[:-2], "--trainer.precision", "8"], 2)[0]
    assert what.startswith("error: trainer.precision is 8; it takes 64, 32, 16 or 'transformer-engine', ")
    assert what.endswith("'32-true', '64-true' or '64', '32', '16', 'bf16' or null")


@pytest.mark.parametrize("command", [["describe"], ["fit", "--config"]], ids=" ".join)
def test_a_run_or_a_part_of_a_name_in_place_of_a_config(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    for given, hint in (
        (tmp_path, f"it is the folder of a run: give {tmp_path / 'config.yaml'}"),
        ("emoji", "give dalle/emoji or dvae/emoji"),
        ("moji", "give a path, or one of the shipped names: dalle/cifar10, dalle/demo, "),
    ):
        what, told = refused(capsys, dalle, [*command, given], 2)
        assert what == f"error: there is no config {given}" and told.startswith(f"hint: {hint}")


@pytest.mark.parametrize(
    "args",
    [
        ["sample"], ["sample", "RUN", "x", "--bogus", "1"], ["sample", "RUN", "x", "y"], ["sample", "RUN", "-x"],
        ["vocab"], ["prepare"], ["prepare", "scenes"], ["demo", "extra"], ["sample", "RUN", "x", "--exact", "maybe"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(args, capsys):
    refused(capsys, dalle, args, 2)


WRONG = [
    ["--temperature", "0"], ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "inf"],
    ["--temperature", "warm"], ["--top_k", "0"], ["--top_k", "17"], ["--top_k", "2.5"], ["--top_p", "0"],
    ["--top_p", "1.1"], ["--top_p", "nan"], ["--guidance", "nan"], ["--guidance", "-1"], ["--guidance", "inf"],
    ["--count", "0"], ["--count", "-1"], ["--count", "1.5"], ["--keep", "0"], ["--keep", "5", "--count", "4"],
    ["--rerank", "clip"], ["--seed", "-1"], ["--seed", "x"], ["--seed", str(2**63)],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_values_of_sample_write_nothing(wrong, tmp_path, tiny_dalle, capsys):
    out = tmp_path / "out"
    what, _ = refused(capsys, dalle, ["sample", tiny_dalle, "a red circle", "--out", out, *wrong], 2)
    assert wrong[0].strip("-") in what or wrong[1] in what
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("prompt", ["", "  "])
def test_prompts_that_say_nothing(prompt, tmp_path, tiny_dalle, capsys):
    what, _ = refused(capsys, dalle, ["sample", tiny_dalle, prompt, "--out", tmp_path / "out"], 2)
    assert "says nothing" in what


@pytest.mark.parametrize("content", [b"", b"\n\n", "caf\u00e9".encode("latin-1"), None], ids=str)
def test_wrong_prompts_files(content, tmp_path, tiny_dalle, capsys):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    args = ["sample", tiny_dalle, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out"]
    what, _ = refused(capsys, dalle, args, 2)
    assert "p.txt" in what and not (tmp_path / "out").exists()


def test_a_prompt_or_a_file_but_not_both_and_not_neither(tmp_path, tiny_dalle, capsys):
    refused(capsys, dalle, ["sample", tiny_dalle], 2)
    refused(capsys, dalle, ["sample", tiny_dalle, "a", "--prompts", "p.txt"], 2)


def test_a_missing_run(tmp_path, capsys):
    what, _ = refused(capsys, dalle, ["sample", tmp_path / "none", "a", "--out", tmp_path / "out"], 4)
    assert "none" in what
    for command in ("reconstruct", "codebook", "evaluate"):
        refused(capsys, dvae, [command, tmp_path / "none", "scenes:val:4"], 4)


@pytest.mark.parametrize("fault", ["flip", "cut", "json", "stage 1"])
def test_a_corrupt_run(fault, tmp_path, tiny_dalle, tiny_dvae, capsys):
    model = shutil.copytree(tiny_dalle / "model", tmp_path / "model")
    (weights,) = model.glob("weights-*")
    content = weights.read_bytes()
    if fault == "flip":
        weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif fault == "cut":
        weights.write_bytes(content[:100])
    elif fault == "json":
        (model / "artefact.json").write_text("{")
    else:
        shutil.rmtree(model)
        shutil.copytree(tiny_dvae, model)
    refused(capsys, dalle, ["sample", tmp_path, "a", "--out", tmp_path / "out"], 4)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback_too(tmp_path, capsys):
    assert run(dalle, ["sample", tmp_path, "a", "--out", tmp_path / "out", "--debug"]) == 4
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "error: " in err and "hint: " in err


def test_an_out_that_cannot_be_written(tmp_path, tiny_dalle, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, dalle, ["sample", tiny_dalle, "a", "--out", tmp_path / "file"], 5)


@pytest.mark.parametrize(
    "prompt", ["a red circle", "null", "[1, 2]", "{a: b}", "12", "1e3", "yes", "a: b", "@file", "-x"]
)
def test_a_prompt_is_taken_to_the_letter(prompt, tmp_path, tiny_dalle, capsys):
    given = ["--", prompt] if prompt.startswith("-") else [prompt]
    assert run(dalle, ["sample", "--count", 1, "--keep", 1, "--out", tmp_path, tiny_dalle, *given]) == 0
    (made,) = tmp_path.glob("*.json")
    assert json.loads(made.read_text())["prompt"] == prompt


def test_sample_passes_every_setting_on(tmp_path, tiny_dalle, capsys):
    given = {"count": 3, "keep": 2, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "guidance": 1.5, "rerank": "pmi",
             "seed": 7, "exact": True}  # fmt: skip
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value).lower())]
    assert run(dalle, ["sample", tiny_dalle, "a cross", "--out", tmp_path, *flags]) == 0
    made = json.loads((tmp_path / "a-cross-seed7.json").read_text())
    assert {name: made[name] for name in given} == given and len(made["pictures"]) == 2


def test_from_pictures_to_token_files(tmp_path, tiny_dvae, tiny_dalle, capsys):
    text, tokens = tmp_path / "text.json", tmp_path / "tokens"
    assert run(dalle, ["vocab", "scenes:train:64", "--size", 300, "--length", 16, "--out", text]) == 0
    prepare = ["prepare", "scenes:train:64", "--dvae", tiny_dvae, "--text", text, "--out", tokens]
    assert run(dalle, prepare) == 0
    assert (tokens / "prepared.json").exists() and f"wrote {tokens}" in capsys.readouterr().out
    assert "not empty" in refused(capsys, dalle, prepare, 2)[0]


@pytest.mark.parametrize(
    "change, code",
    [
        ({"--dvae": ""}, 2), ({"--dvae": "/nowhere"}, 4), ({"--text": "/nowhere/text.json"}, 4), ({"--batch": "0"}, 2),
        ({"--length": "0"}, 2), ({"--val": "scenes:nosuch"}, 3), ({"data": "/nowhere"}, 3),
        ({"data": "scenes:train:0"}, 3), ({"data": "scenes:train:1"}, 3),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_of_prepare_leave_no_folder(change, code, tmp_path, tiny_dvae, tiny_tokens, capsys):
    given = {"--dvae": tiny_dvae, "--text": tiny_tokens / "text.json", "--out": tmp_path / "out", **change}
    data = given.pop("data", "scenes:train:64")
    refused(capsys, dalle, ["prepare", data, *(part for pair in given.items() for part in pair)], code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--size", "255"], ["--length", "0"], ["--size", "many"]], ids=" ".join)
def test_wrong_values_of_vocab_write_nothing(wrong, tmp_path, capsys):
    refused(capsys, dalle, ["vocab", "scenes:train:64", "--out", tmp_path / "text.json", *wrong], 2)
    assert not list(tmp_path.iterdir())


def test_reconstruct_writes_pairs(tmp_path, tiny_dvae, capsys):
    assert run(dvae, ["reconstruct", tiny_dvae, "scenes:val:64", "--count", 6, "--out", tmp_path]) == 0
    assert open_image(tmp_path / "reconstructions.png").shape == (3, 2 * 34 + 2, 8 * 34 + 2)
    assert "over 6 pictures" in capsys.readouterr().out


def test_codebook_says_what_it_wrote(tmp_path, tiny_dvae, capsys):
    assert run(dvae, ["codebook", tiny_dvae, "scenes:val:64", "--out", tmp_path]) == 0
    out = capsys.readouterr().out
    assert all(f"wrote {path}" in out for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 7


def test_evaluate_measures_what_reconstruct_shows(tmp_path, tiny_dvae, capsys):
    for command in ("evaluate", "reconstruct"):
        assert run(dvae, [command, tiny_dvae, "scenes:val:64", "--count", 6, "--out", tmp_path]) == 0
    measured, shown = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("evaluation", "reconstructions"))
    assert measured["psnr"] == pytest.approx(shown["psnr"]) and measured["pictures"] == len(shown["pictures"]) == 6
    assert f"PSNR {measured['psnr']:.2f} dB\n" in capsys.readouterr().out


@pytest.mark.parametrize("features", ["", "none.pt2", "pyproject.toml"])
def test_features_that_are_none(features, tmp_path, tiny_dvae, capsys):
    args = ["evaluate", tiny_dvae, "scenes:val:4", "--out", tmp_path / "out", "--features", features]
    what, hint = refused(capsys, dvae, args, 2)
    assert features in what and "torch.export" in hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["reconstruct", "codebook", "evaluate"])
@pytest.mark.parametrize("change, code", [(["--count", "0"], 2), (["--count", "-3"], 2), (["--count", "x"], 2)])
def test_wrong_values_of_stage_one_write_nothing(command, change, code, tmp_path, tiny_dvae, capsys):
    refused(capsys, dvae, [command, tiny_dvae, "scenes:val:4", "--out", tmp_path, *change], code)
    assert not list(tmp_path.iterdir())


def test_missing_data(tmp_path, tiny_dvae, capsys):
    refused(capsys, dvae, ["reconstruct", tiny_dvae, tmp_path / "none", "--out", tmp_path], 3)
    for command in ("codebook", "evaluate"):
        refused(capsys, dvae, [command, tiny_dvae, "scenes:train:0", "--out", tmp_path], 3)
