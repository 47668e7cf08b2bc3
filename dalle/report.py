"""`dalle report`: one HTML page of a run, to look at offline and to send to a colleague.

The page holds everything that it shows. It has no script and allows none, asks nothing of any server, and shows text
of the run (captions, settings, file names) as text, whatever stands in it. What a run lacks is said, not guessed.

This file reads what a training wrote; it knows how neither stage is trained.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dvae import artefact, codebook, plots
from dvae.errors import ArtefactError, UserError, warn
from dvae.files import write_bytes
from dvae.images import grid, open_image, to_uint8
from dvae.tokenizer import load as load_dvae

FRAMES = 12  # validations that are shown of each kind of picture
MOST_PANELS = 16
LONGEST_WEBP = 16_383  # pixels a side, of that format
MOST_KINDS = 6  # of pictures over time
MOST_CAPTIONS = 16  # beside a picture
MOST_ROWS = 50  # of a table
MOST_PICTURE_BYTES = 3_500_000  # of the whole page; with curves and texts it stays below 8 MB
MOST_TEXT = 60_000  # letters of a file that is shown as text
MOST_PAINTED = 2**26  # pixels, up to which all codes are painted for the atlas

STRIPS = {
    "samples": ("Drawn at each validation", "The same captions from the same random numbers, four pictures a row."),
    "reconstructions": ("Reconstructions", "Pictures of the validation set, each beside what the codes keep of it."),
    "codebook": ("Use of the codes", "How often each code was chosen in the validation set."),
}
TITLES = {"dvae": "Stage 1: the image tokenizer", "dalle": "Stage 2: the transformer", "": "A training"}


def report(run: str, out: str | None = None) -> None:
    """Write one HTML page of a run: curves, pictures over time, codebook, settings, versions and results.

    Args:
        run: a run folder of either stage, a folder of dalle demo, or a model folder.
        out: the file to write; null: report.html in the run folder.
    """
    stages = find_stages(run)
    for stage in stages:
        if damage := next((said for said in stage.missing if said.startswith("There is no trained model")), None):
            warn(damage, "the page shows what else is there; train again, or copy the model again")
    path = Path(out) if out else (Path(run) if Path(run).is_dir() else Path()) / "report.html"
    write_bytes(path, page(Path(run), stages).encode())
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


# -------------------------------------------------------------------------------------------------- what a run holds


@dataclass
class Stage:
    """What one training left behind; `missing` says in sentences what is not there or cannot be read."""

    kind: str
    folder: Path
    curves: dict[str, plots.Curve] = field(default_factory=dict)
    pictures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    settings: str = ""
    versions: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    model: Path | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def imported(self) -> bool:
        """Whether others have trained it: see `dvae.importers`."""
        return self.manifest is not None and "imported" in self.manifest["about"]


def find_stages(run: str) -> list[Stage]:
    """The trainings in a folder: one of its own, or those of a demo.

    Raises:
        ArtefactError: there is none.
    """
    folder = Path(run)
    if not folder.is_dir():  # a name of a model that comes with the project, or a mistake
        return [read_stage(artefact.find(run, "dalle"))]
    folders = [folder] if is_run(folder) else [folder / name for name in ("dvae", "dalle") if is_run(folder / name)]
    if not folders:
        raise ArtefactError(f"there is no run in {run}", "give what dvae fit, dalle fit or dalle demo has written")
    return [read_stage(folder) for folder in folders]


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "model", artefact.MANIFEST))


def read_stage(folder: Path) -> Stage:
    stage = Stage("", folder)
    try:
        stage.model = folder if (folder / artefact.MANIFEST).is_file() else folder / "model"
        stage.manifest = artefact.verify(stage.model)
        stage.kind = stage.manifest["kind"]
    except ArtefactError as error:
        stage.missing.append(f"There is no trained model to look into: {error.what}.")
        stage.model = None
    missing = [] if stage.imported else stage.missing  # no training here, none of its files
    stage.settings = text_of(folder / "config.yaml", missing)
    stage.curves = plots.read(text_of(folder / "metrics.csv", missing, most=None))
    if not stage.curves and (folder / "metrics.csv").exists():
        stage.missing.append("metrics.csv holds no numbers yet.")
    for path in sorted((folder / "samples").glob("*.png")):
        if named := re.fullmatch(r"(.+)-(\d{1,12})\.png", path.name):
            stage.pictures.setdefault(named[1], []).append((int(named[2]), path))
    lines = text_of(folder / "samples" / "prompts.txt", []).splitlines()
    stage.captions = [line.partition(": ")[2] for line in lines if re.match(r"\d+: ", line)]
    stage.versions = versions_of(folder, stage.settings, stage.missing)
    stage.kind = stage.kind or guessed(stage)
    return stage


def guessed(stage: Stage) -> str:
    """Which stage a training without a model is, by what it has logged, drawn or been told."""
    for kind, metric, pictures, setting in (
        ("dvae", "codebook/used", "reconstructions", "temperature"),
        ("dalle", "val/image_loss", "samples", "depth"),
    ):
        if metric in stage.curves or pictures in stage.pictures or re.search(rf"(?m)^  {setting}:", stage.settings):
            return kind
    return ""


def text_of(path: Path, missing: list[str], most: int | None = MOST_TEXT) -> str:
    """A file as text, its bytes that are no UTF-8 marked; of a long one the beginning."""
    try:
        with open(path, "rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except OSError:
        missing.append(f"There is no {path.name}.")
        return ""
    if most is not None and len(content) > most:
        missing.append(f"{path.name} is long: only its first {most:,} bytes are shown.")
        content = content[:most]
    return content.decode(errors="replace")


def versions_of(folder: Path, settings: str, missing: list[str]) -> list[dict[str, Any]]:
    """What each part of the training ran with; of a run that did not note it, what its config says."""
    try:
        noted = json.loads((folder / "versions.json").read_bytes())
        if not (isinstance(noted, list) and all(isinstance(entry, dict) for entry in noted)):
            raise ValueError("not a list of entries")
        return noted[-MOST_ROWS:]
    except FileNotFoundError:
        said = re.match(r"# lightning\.pytorch==(\S+)", settings)
        return [{"update": 0, "lightning": said[1]}] if said else []
    except (OSError, ValueError) as error:
        missing.append(f"versions.json cannot be read: {error}.")
        return []


# -------------------------------------------------------------------------------------------------------------- text

_KEPT = "\u200c\u200d"  # joiners, which emoji and many scripts need


def escaped(text: Any, most: int = 200, lines: bool = False) -> str:
    """A text of any origin for the page; what is not printable, such as a control of writing direction, by number."""
    text = str(text)
    more = f"\u2026 ({len(text):,} letters)" if len(text) > most else ""
    kept = _KEPT + "\n\t" * lines

    def visible(letter: str) -> str:
        plain = letter.isprintable() or letter in kept or unicodedata.category(letter) == "Zs"
        return letter if plain else f"[U+{ord(letter):04X}]"

    return html.escape("".join(map(visible, text[:most])) + more, quote=True)


def isolated(text: Any, most: int = 200) -> str:
    """As `escaped`; writing from right to left does not turn what stands around it."""
    return f"<bdi>{escaped(text, most)}</bdi>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------- pictures


def webp(picture: Tensor, most: int) -> tuple[str, int, int]:
    """A uint8 picture `(3, H, W)` as a data address of at most so many bytes, with its width and height, pixels.

    Exact if it can be; else of lower quality, at last smaller.
    """
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    width, height = image.size
    image.thumbnail((LONGEST_WEBP, LONGEST_WEBP))
    while True:
        for options in ({"lossless": True}, {"quality": 90}, {"quality": 70}):
            file = io.BytesIO()
            image.save(file, "WEBP", **options)
            if len(content := file.getvalue()) <= most or max(image.size) <= 16:
                return data("image/webp", content), width, height
        image = image.resize((max(1, image.width * 2 // 3), max(1, image.height * 2 // 3)))


def data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(picture: Tensor, alt: str, most_bytes: int, most_width: int) -> str:
    """A picture, small ones enlarged up to twice their size."""
    source, width, height = webp(picture, most_bytes)
    wide = min(most_width, 2 * width)
    return f'<img src="{source}" width="{wide}" height="{round(height * wide / width)}" alt="{escaped(alt)}">'


def curve_pictures(stage: Stage) -> str:
    """A picture of each quantity, for light and for dark."""
    drawn = plots.panels(stage.curves)
    if not drawn:
        return ""
    mark, cells = plots.best(stage.curves), []
    for panel in drawn[:MOST_PANELS]:
        light, dark = (data("image/svg+xml", plots.panel_svg(panel, mark, dark)) for dark in (False, True))
        ends = ", ".join(f"{label} {curve.values[-1]:.4g}" for label, curve in panel.curves.items())
        alt = escaped(f"{panel.title}: {ends} at the end")
        cells.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" width="330" height="205" alt="{alt}"></picture>'
        )
    said = ["Over updates."]
    if mark is not None:
        said.append(f"The dotted line is update {mark:,}, the best validation, whose weights are kept in model/.")
    if len(drawn) > MOST_PANELS:
        said.append(f"{MOST_PANELS} of {len(drawn)} quantities are drawn.")
    return f'<h3>Curves</h3><p class="note">{" ".join(said)}</p><div class="curves">{"".join(cells)}</div>'


def strip(stage: Stage, name: str, title: str, note: str, most_bytes: int) -> str:
    """The pictures of one kind over time, one at a time; without styles all of them."""
    found, best = stage.pictures.get(name, []), plots.best(stage.curves)
    captions = stage.captions if name == "samples" and len(stage.captions) <= MOST_CAPTIONS else []
    images = []
    for update, path in chosen(found, FRAMES):
        try:
            alt = f"{title}, update {update:,}"
            images.append((update, shown(open_image(path), alt, most_bytes, 420 if captions else 704)))
        except (UserError, OSError) as error:
            stage.missing.append(f"{path.name} cannot be shown: {str(error).removeprefix(f'{path}: ')}.")
    if not images:
        return ""
    if len(found) > FRAMES:
        note += f" {len(images)} of {len(found)} validations are shown."
    beside = "".join(f"<li><span>{isolated(caption)}</span></li>" for caption in captions)
    beside, layout = (f"<ol>{beside}</ol>", "captioned") if captions else ("", "plain")
    parts, group = [], escaped(f"{stage.kind}-{name}")
    first = best if best in dict(images) else images[-1][0]
    for update, image in images:
        place, label = f"{group}-{update}", f"{update:,}" + (" (best)" if update == best else "")
        checked = " checked" if update == first else ""
        parts.append(
            f'<input type="radio" name="{group}" id="{place}"{checked}><label for="{place}">{label}</label>'
            f'<figure class="{layout}">{image}{beside}</figure>'
        )
    return f'<h3>{title}</h3><p class="note">{note}</p><div class="strip"><b>update</b>{"".join(parts)}</div>'


def chosen(found: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[place] for place in places]


def atlas(stage: Stage, most_bytes: int) -> str:
    """What each code of the image tokenizer paints alone, see `codebook.painted_alone`."""
    tokenizer = stage.model
    if stage.kind == "dalle" and stage.manifest and "dvae" in stage.manifest["parts"]:
        tokenizer = stage.model / stage.manifest["parts"]["dvae"]["folder"]
    if tokenizer is None:
        return ""
    try:
        model = load_dvae(tokenizer)
    except UserError as error:
        stage.missing.append(f"The image tokenizer cannot be loaded: {error.what}.")
        return ""
    title = "<h3>Atlas of the codes</h3>"
    if model.vocab_size * model.config.image_size**2 > MOST_PAINTED:
        return f'{title}<p class="note">Too many to paint here; <code>dvae codebook</code> paints them.</p>'
    patches = codebook.painted_alone(model)
    patches = patches[patches.mean((1, 2, 3)).argsort()]
    enlarged = max(1, round(20 / patches.shape[-1]))
    patches = patches.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    picture = grid(to_uint8(patches), columns=math.ceil(math.sqrt(2 * len(patches))), pad=1)
    rows, columns = codebook.grid_alone(model)
    note = f"What each of the {len(patches):,} codes paints in {rows} x {columns} cells of it, from dark to light."
    image = shown(picture, "Atlas of the codes", most_bytes, 940)
    return f'{title}<p class="note">{note}</p><figure class="plain">{image}</figure>'


# ---------------------------------------------------------------------------------------------------------- numbers


def kept(stage: Stage) -> dict[str, float]:
    """The numbers of the best validation: those that the model was saved with, or else those of metrics.csv."""
    if stage.manifest is not None:
        about = stage.manifest["about"].items()
        return {name: value for name, value in about if isinstance(value, int | float) and abs(value) < 1e30}
    best = plots.best(stage.curves)
    return {} if best is None else {"step": best, **at(stage.curves, best)}


def at(curves: Mapping[str, plots.Curve], update: int) -> dict[str, float]:
    """What a validation at this update has found."""
    found = {name: curve.values[curve.updates == update] for name, curve in curves.items() if not name[:6] == "train/"}
    return {name: float(values[-1]) for name, values in found.items() if len(values) and math.isfinite(values[-1])}


def facts(stage: Stage) -> list[tuple[str, str, str]]:
    """The numbers to know first: (name, value, remark), of those that are known."""
    numbers, config = kept(stage), stage.manifest["config"] if stage.manifest else {}
    last = max((int(curve.updates[-1]) for curve in stage.curves.values()), default=None)
    found = []

    def tell(name: str, title: str, form: str, remark: str = "") -> None:
        if name in numbers:
            found.append((title, form.format(numbers[name]), remark))

    tell("step", "best update", "{:,.0f}", "" if last is None else f"of {last:,}")
    codes = config.get("vocab_size", config.get("vocab_image"))
    known = isinstance(codes, int) and codes > 0
    guess = f"nats a token; {math.log(codes):.2f} by blind guessing" if known else "nats a token"
    tell("val/psnr", "reconstructions", "{:.1f} dB", "PSNR")
    tell("codebook/used", "codes in use", "{:.1%}", f"of {codes:,}" if known else "")
    tell("codebook/perplexity", "perplexity", "{:,.0f}", "codes as if used evenly")
    tell("val/image_loss", "image loss", "{:.3f}", guess)
    tell("val/image_accuracy", "image tokens", "{:.1%}", "guessed right")
    tell("val/text_loss", "text loss", "{:.3f}", "nats a token")
    if stage.manifest:
        size = stage.manifest["files"]["weights"]["bytes"]
        found.append(("weights", f"{size / 1e6:,.1f} MB", ""))
    return found


def validations(stage: Stage) -> str:
    """The best and the last validation side by side."""
    best, losses = plots.best(stage.curves), stage.curves.get("val/loss")
    if best is None:
        return ""
    last = int(losses.updates[-1])
    updates = {best: "best", last: "last"} if last != best else {best: "best and last"}
    both = [at(stage.curves, update) for update in updates]
    rows = [
        [f"<code>{escaped(name)}</code>", *(f"{found[name]:#.4g}" if name in found else "" for found in both)]
        for name in list(dict.fromkeys(name for found in both for name in found))[:MOST_ROWS]
    ]
    note = "Over the whole validation set."
    if losses.values[-1] > np.nanmin(losses.values):
        note += " The loss has risen since its best, whose weights are kept."
    head = ("", *(f"{which}, update {update:,}" for update, which in updates.items()))
    return f'<h3>Validation</h3><p class="note">{note}</p>{table(head, rows)}'


def demo_results(folder: Path, missing: list[str], most_bytes: int) -> str:
    """What dalle demo has judged: the share of pictures that show their caption, with 95 % intervals."""
    if not (folder / "report.json").exists():
        return ""
    try:
        found = json.loads((folder / "report.json").read_bytes())
        chosen, kinds = found["chosen"], ("seen", "held-out")
        results = {"reconstructions by stage 1": found["reconstructions"]}
        for name in found["captions"]["seen"]:
            results[name] = {kind: found["captions"][kind][name] for kind in kinds}
        rows = [
            (("<b>{}</b>" if name.endswith(f" by {chosen['ranker']}") else "{}").format(escaped(name)),
             *(share(result[kind]) for kind in kinds))
            for name, result in results.items()
        ]  # fmt: skip
        settings = ", ".join(f"{escaped(key)} {escaped(value)}" for key, value in chosen.items())
        trials = escaped(found["reconstructions"]["seen"]["trials"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        missing.append("report.json is not the report of a demo.")
        return ""
    note = (
        f"Percent of {trials} captions each whose picture shows what they say, with 95 % intervals. Chosen on other "
        f"captions: {settings}."
    )
    picture = ""
    try:
        image = shown(open_image(folder / "samples.png"), "Candidates for eight captions", most_bytes, 1200)
        picture = f'<figure class="plain wide sheet">{image}</figure>'
    except (UserError, OSError):
        missing.append("samples.png cannot be shown.")
    head = ("", "compositions seen", "held out of both stages")
    return f'<section><h2>Results</h2><p class="note">{note}</p>{table(head, rows)}{picture}</section>'


def share(result: dict[str, float]) -> str:
    """A share with its interval, as numbers and as a bar."""
    value, low, high = (100 * min(1.0, max(0.0, float(result[key]))) for key in ("value", "low", "high"))
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="all" width="100" height="8"/><rect class="part" width="{value:.2f}" height="8"/>'
        f'<rect class="range" x="{low:.2f}" y="3" width="{high - low:.2f}" height="2"/></svg>'
        f"<b>{value:.1f}</b> <small>[{low:.1f}, {high:.1f}]</small>"
    )


# ----------------------------------------------------------------------------------------------------------- the page


def page(run: Path, stages: list[Stage]) -> str:
    """The whole page."""
    pictures = 1 + sum(min(FRAMES, len(found)) for stage in stages for found in stage.pictures.values()) + len(stages)
    most_bytes = min(400_000, MOST_PICTURE_BYTES // pictures)
    missing: list[str] = []
    results = demo_results(run, missing, most_bytes)
    sections = "".join(section(stage, most_bytes, with_atlas=stage is stages[0]) for stage in stages)
    name = run.resolve().name or str(run)
    trained = [TITLES[stage.kind].partition(": ")[2] or "a model" for stage in stages if not stage.imported]
    parts = ["An imported image tokenizer"] * (len(trained) < len(stages))
    parts += ["A training of " + " and ".join(trained)] * bool(trained)
    style_digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    rules = f"default-src 'none'; img-src data:; style-src 'sha256-{style_digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escaped(name)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{isolated(name)}</h1><p>{'. '.join(parts)}</p></header>{told(missing)}{results}{sections}"
        "<footer>Written by <code>dalle report</code>. This page holds all that it shows and runs no script.</footer>"
        "</main></body></html>\n"
    )


def section(stage: Stage, most_bytes: int, with_atlas: bool) -> str:
    cards = [
        f"<div><dt>{title}</dt><dd>{value}<small>{remark}</small></dd></div>" for title, value, remark in facts(stage)
    ]
    parts = [curve_pictures(stage), validations(stage)]
    kinds = sorted(stage.pictures, key=lambda name: (name not in STRIPS, name == "codebook", name))
    for name in kinds[:MOST_KINDS]:
        parts.append(strip(stage, name, *STRIPS.get(name, (escaped(name), "")), most_bytes))
    if len(kinds) > MOST_KINDS:
        stage.missing.append(f"Only {MOST_KINDS} of {len(kinds)} kinds of pictures are shown.")
    parts += [atlas(stage, most_bytes) if with_atlas else "", settings(stage)]
    head = f"<section><h2>{TITLES[stage.kind]}</h2>{origin(stage)}<dl>{''.join(cards)}</dl>{told(stage.missing)}"
    return f"{head}{''.join(parts)}</section>"


def origin(stage: Stage) -> str:
    """Of an imported model: whose it is, by which licence, and from which files."""
    if not stage.imported:
        return ""
    about = stage.manifest["about"]
    files = [isolated(entry["file"]) for entry in about.values() if isinstance(entry, Mapping) and "file" in entry]
    said = [f"Imported: {isolated(about['imported'])}", f"licence: {isolated(about.get('licence', 'not known'))}"]
    said += [f"from: {', '.join(files)}"] * bool(files)
    return f'<p class="note">{"; ".join(said)}.</p>'


def told(missing: Sequence[str]) -> str:
    sentences = "".join(f"<li>{escaped(sentence, 500)}</li>" for sentence in missing)
    return f'<ul class="missing">{sentences}</ul>' if sentences else ""


def settings(stage: Stage) -> str:
    """What the training ran with and was told."""
    parts = []
    if stage.versions:
        names = list(dict.fromkeys(name for entry in stage.versions for name in entry))[:12]
        head = [isolated(name, 40) for name in names]
        rows = [[isolated(entry.get(name, ""), 60) for name in names] for entry in stage.versions]
        note = "One row for each time that the training was begun or continued." if len(rows) > 1 else ""
        parts.append(f'<h3>Versions</h3><p class="note">{note}</p>{table(head, rows)}')
    texts = [("Settings: config.yaml", stage.settings)]
    if stage.manifest:
        facts = {key: stage.manifest[key] for key in ("kind", "config", "about", "digest")}
        texts.append(("The model: artefact.json", json.dumps(facts, indent=2, ensure_ascii=False)))
    for title, text in texts:
        if text:
            whole = escaped(text, MOST_TEXT, lines=True)
            parts.append(f"<details><summary>{title}</summary><pre>{whole}</pre></details>")
    return "".join(parts)


STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1d2027; --soft: #5d6370; --line: #e1e4ea;
  --blue: #0072b2; --orange: #d55e00; --warm: #fff4e0; --pale: #e8eef4 }
@media (prefers-color-scheme: dark) { :root { --page: #0e1013; --card: #16181d; --ink: #e5e7ec; --soft: #9aa1af;
  --line: #2b2f38; --blue: #56b4e9; --orange: #e69f00; --warm: #2e2618; --pale: #242a33 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 3rem }
header h1 { font-size: 2rem; line-height: 1.2; margin: 0 }
header p, footer { color: var(--soft); margin: .25rem 0 1.5rem }
footer { font-size: .85rem; margin: 2rem 0 0 }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.25rem 1.5rem 1.5rem;
  margin: 0 0 1.5rem }
h2 { font-size: 1.35rem; margin: 0 0 1rem }
h3 { font-size: 1.05rem; margin: 2rem 0 .25rem }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .875em }
small, .note { color: var(--soft) }
.note { font-size: .9rem; margin: 0 0 .75rem; max-width: 46rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 }
dl div { border: 1px solid var(--line); border-radius: 10px; padding: .6rem .8rem }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums }
dd small { display: block; font-size: .78rem; font-weight: 400 }
.missing { background: var(--warm); border-radius: 10px; padding: .7rem 1rem .7rem 2rem; margin: 1rem 0 0;
  font-size: .9rem }
img { max-width: 100%; height: auto; display: block }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem }
.curves img { width: 100% }
figure { margin: 0 }
figure img { border-radius: 6px; background: #ffffff }
.strip { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center }
.strip b { font-size: .8rem; font-weight: 400; color: var(--soft); margin-right: .25rem }
.strip input { position: absolute; opacity: 0; pointer-events: none }
.strip label { border: 1px solid var(--line); border-radius: 99px; padding: .1rem .7rem; font-size: .85rem;
  cursor: pointer; font-variant-numeric: tabular-nums }
.strip label:hover { border-color: var(--blue) }
.strip input:checked + label { background: var(--blue); border-color: var(--blue); color: var(--card) }
.strip input:focus-visible + label { outline: 2px solid var(--orange); outline-offset: 2px }
.strip figure { order: 1; flex-basis: 100%; margin-top: .5rem }
.strip input:not(:checked) + label + figure { display: none }
.captioned { display: grid; grid-template-columns: fit-content(26.25rem) minmax(7rem, 1fr); gap: 0 1rem }
.captioned ol { list-style: none; display: grid; grid-auto-rows: minmax(0, 1fr); margin: 0; padding: 0; height: 100% }
.captioned li { display: flex; align-items: center; min-height: 0; overflow: hidden; line-height: 1.3;
  font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 60% }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
td:first-child { white-space: normal; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 500; white-space: normal }
.bar { width: 8rem; height: .5rem; margin-right: .6rem; border-radius: 3px; vertical-align: middle }
.bar .all { fill: var(--pale) }
.bar .part { fill: var(--blue) }
.bar .range { fill: var(--orange) }
section > .plain { margin-top: 1rem }
.sheet img { min-width: 52rem }
details { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0 0; padding: .55rem .9rem }
summary { cursor: pointer; font-weight: 500 }
pre { overflow-x: auto; margin: .75rem 0 .25rem; line-height: 1.45; overflow-wrap: normal }
@media (max-width: 40rem) { main { padding: 1.25rem .6rem 2rem } section { padding: 1rem }
  .captioned { grid-template-columns: 62% 1fr; gap: 0 .6rem } .captioned li { font-size: .72rem }
  th, td { font-size: .85rem; padding-right: .6rem } .bar { display: none }
  td b + small { display: block } }
@media print { body { background: none } section { break-inside: avoid-page; border: 0 } }
"""
