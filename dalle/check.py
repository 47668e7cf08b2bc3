"""What a data source holds, and whether training would start on it: `dalle check`.

Every row is looked at once and leaves a few numbers behind (some 50 bytes), so that memory hardly grows with the
source. The numbers become report.json, and the report becomes the sentences on the terminal. This file knows nothing
of how models are trained.
"""

import functools
import json
import re
import shlex
import shutil
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from dalle.pairs import pairs_of
from dalle.prepare import LONGEST
from dalle.text import Text
from dvae import files, seeds
from dvae.data import MANIFEST, Source, check_names, check_outside, check_share, open_source, order, split
from dvae.drawings import Label, sheet
from dvae.errors import DataError, UserError, warn
from dvae.images import save, to_uint8
from dvae.listing import printable
from dvae.tokenizer import ImageTokenizer, load

KIND, REPORT, SKIPPED, PICTURES = "dalle check", "report.json", "skipped.txt", "pictures.png"
VAL_SHARE = 0.05  # what `dvae fit` and `dalle prepare` set aside unless they are told otherwise

_FEW = 1_000  # pairs below which a transformer can do little but repeat them
_EXAMPLES, _SKIPPED_SHOWN = 5, 10
_LONGEST_SHOWN = 200  # characters of a caption
_SHAPES = {"square": 1.02, "up to 4:3": 4 / 3, "up to 3:2": 3 / 2, "up to 2:1": 2, "up to 4:1": 4, "longer": np.inf}
_SYMBOLS, _RIGHT_TO_LEFT, _BIDI, _INVISIBLE, _UNKNOWN, _REPLACED = _MARKS = (
    "emoji and symbols",
    "right-to-left letters",
    "bidirectional controls",
    "invisible characters",
    "private or unassigned characters",
    "replacement characters (a wrong encoding)",
)


def check(
    data: str,
    size: PositiveInt = 64,
    out: str = "runs/check",
    text: str | None = None,
    length: PositiveInt | None = None,
    dvae: str | None = None,
    val: str | None = None,
    max_bad: float = 0.01,
    threads: PositiveInt = 4,
) -> None:
    """Look at every picture and caption of a data source: what can be used, what cannot and why, and what to expect.

    Prints it, and writes report.json, skipped.txt (all that cannot be used, with the reason), pictures.png (five pairs
    as the model will see them) and the list of examined rows. Exit code 3: training would not start.

    Args:
        data: any data source: scenes:train, a folder, a listing, tars, Parquet files, a Hub data set.
        size: pixels a side of the squares to train on; a --dvae says its own.
        out: folder to write: new, empty, or that of an earlier check.
        text: a vocabulary to count the captions in: what `dalle vocab` wrote, or any tokenizer.json.
        length: text ids per caption, where the vocabulary does not say.
        dvae: run folder or artefact folder of stage 1, to see what it makes of the five pictures.
        val: the source to validate on; without it a share of `data` is set aside.
        max_bad: share of rows that may be unusable.
        threads: pictures decoded at a time; any number gives the same report.
    """
    check_names(data, val)
    words = Text.from_file(text, length) if text else None
    model = load(dvae) if dvae else None
    size = model.config.image_size if model else size
    folder, new = Path(out), not Path(out).exists()
    check_outside(out, data, val)
    _claim(folder)
    try:
        source = open_source(data, size, folder=folder, threads=threads)
        held = None if val is None else open_source(val, size, folder=folder / "val", threads=threads)
    except UserError:  # there is no such source, and nothing to report
        if new:
            shutil.rmtree(folder)
        raise
    rows = Rows(source, words)
    spoken = rows.pairs > 0
    usable = pairs_of(source) if spoken else source
    names = {"source": data, "text": text, "dvae": dvae, "val": val}
    report: dict[str, Any] = {"kind": KIND, "size": size}
    report |= {title: name and printable(name) for title, name in names.items()}
    report |= {"listed": source.listed, "pictures": len(source), "pairs": rows.pairs, "strays": list(source.strays)}
    report["skipped"] = _skipped(usable, folder / SKIPPED)
    if len(source):
        report |= {"duplicates": _duplicates(source, rows), "sizes": _sizes(source, rows, size)}
    if spoken:
        report["captions"] = _captions(source, rows, words, length or LONGEST)
    if held is not None:
        held = pairs_of(held) if spoken else held
        digests = np.fromiter((_short(held.digest(index)) for index in range(len(held))), np.uint64, len(held))
        shared = np.isin(digests, rows.digests)
        report["validation"] = {"listed": held.listed, "used": len(held), "shared": int(shared.sum())}
        report["validation"]["skipped"] = _skipped(held, folder / "val" / SKIPPED)
    problem = None
    try:
        check_share(usable, max_bad)
        if held is None:
            parts = split(usable, VAL_SHARE)
        else:
            check_share(held, max_bad)
            parts = usable, held
        report["split"] = [len(part) for part in parts]
    except DataError as error:
        problem = error
    if len(usable):
        report["examples"] = _draw(usable, words, model, folder / PICTURES)
    report["warnings"] = list(_warnings(report))
    report["verdict"] = _verdict(report, problem, max_bad)
    report["next"] = None if problem else _next(report, folder, max_bad)
    files.write_json(folder / REPORT, report)

    for title, sentence in _sentences(report, out):
        print(_printable(f"{title:<11} {sentence}"))
    for what, hint in report["warnings"]:
        warn(_printable(what), _printable(hint))
    print(_printable(f"wrote {out}\n\n{report['verdict']}"))
    if problem:
        raise problem
    print(_printable(f"next: {report['next']}"))


class Rows:
    """A few numbers for each usable row of a source and each of its captions: what one pass leaves behind.

    Attributes:
        digests: (N,) uint64, the first 8 bytes of each picture's sha256.
        widths, heights: (N,) pixels.
        spoken: (N,) number of captions.
        said: (N,) uint64, equal where rows have the same captions once they are cleaned.
        captions: (C,) uint64, the same of single captions.
        lengths: words, bytes and (with a vocabulary) ids of each cleaned caption, (C,) each.
        letters: captions by what occurs in them: scripts, and other things worth a count.
        formats, modes, notes: pictures by each.
        pairs: rows with a caption.
        foreign: captions with more ids than characters, in which a byte-level vocabulary knows hardly any word.
    """

    def __init__(self, source: Source, words: Text | None):
        digests, said, captions = array("Q"), array("Q"), array("Q")
        widths, heights, spoken = array("I"), array("I"), array("I")
        lengths = {unit: array("I") for unit in ("words", "bytes", *(["ids"] if words else []))}
        self.letters, self.formats, self.modes, self.notes = Counter(), Counter(), Counter(), Counter()
        self.foreign = 0
        clean = cleaner(words)
        for index in tqdm(range(len(source)), "looking at rows", leave=False, delay=1, disable=None):
            about, texts = source.about(index), source.captions(index)
            digests.append(_short(source.digest(index)))
            widths.append(about.width)
            heights.append(about.height)
            self.formats[about.format] += 1
            self.modes[about.mode] += 1
            self.notes.update(about.notes)
            cleaned = [clean(text) for text in texts]
            spoken.append(len(texts))
            said.append(seeds.key(*sorted(cleaned)))
            captions.extend(map(seeds.key, cleaned))
            for text, plain in zip(texts, cleaned, strict=True):
                self.letters.update({kind for character in set(text) for kind in _kinds(character)})
                lengths["words"].append(len(plain.split()))
                lengths["bytes"].append(len(plain.encode()))
                if words:
                    ids = int(words.lengths([text]))
                    lengths["ids"].append(ids)
                    self.foreign += ids > len(plain) + 1  # a space before the first word may be an id
        self.digests, self.said, self.captions = map(np.asarray, (digests, said, captions))
        self.widths, self.heights, self.spoken = map(np.asarray, (widths, heights, spoken))
        self.lengths = {unit: np.asarray(counted) for unit, counted in lengths.items()}
        self.pairs = int((self.spoken > 0).sum())

    def place(self, caption: int) -> tuple[int, int]:
        """The row of a caption, and which of its captions it is."""
        ends = self.spoken.cumsum()
        row = int(np.searchsorted(ends, caption, side="right"))
        return row, caption - int(ends[row]) + int(self.spoken[row])


def _short(digest: str) -> int:
    return int(digest[:16], 16)


def cleaner(words: Text | None) -> Callable[[str], str]:
    """What becomes of a caption before it is cut into ids; without a vocabulary, by the rule of `dalle vocab`."""
    normalizer = (words or Text.train((), 256, 1)).tokenizer.normalizer
    return normalizer.normalize_str if normalizer else str


@functools.cache
def _kinds(character: str) -> frozenset[str]:
    """The script of a letter, which begins its Unicode name, and what else of a character is worth a count."""
    category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
    kinds = set()
    if category.startswith("L"):
        name = re.sub("^(FULLWIDTH|HALFWIDTH|CJK) ", "", unicodedata.name(character, "UNNAMED"))
        kinds.add("Han" if "IDEOGRAPH" in name else name.split()[0].capitalize())
    if direction in ("R", "AL"):
        kinds.add(_RIGHT_TO_LEFT)
    if direction in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"):
        kinds.add(_BIDI)
    elif category == "Cf" and character != "\u200d":  # which joins emoji
        kinds.add(_INVISIBLE)
    if category in ("Co", "Cn"):
        kinds.add(_UNKNOWN)
    if category == "So":
        kinds.add(_REPLACED if character == "\ufffd" else _SYMBOLS)
    return frozenset(kinds)


def _claim(folder: Path) -> None:
    """Make `folder` ours: what an earlier check has left there no longer counts. Nobody else's files are touched."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            ours = json.loads((folder / REPORT).read_bytes())["kind"] == KIND
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"{folder} holds something other than a check", "choose another --out")
    files.write_json(folder / REPORT, {"kind": KIND, "verdict": "unfinished"})
    for name in (MANIFEST, SKIPPED, PICTURES):
        for part in (folder, folder / "val"):
            (part / name).unlink(missing_ok=True)


def _skipped(source: Source, path: Path) -> dict[str, Any]:
    """Write each skipped item with its reason to `path`; how many there are, by reason, and the first of them."""
    reasons, first = Counter(), []
    with files.replacing(path) as file:
        for key, reason in source.skipped():
            file.write(f"{key}: {reason}\n".encode(errors="backslashreplace"))
            reasons[re.sub(r" \(.*| at byte .*|: \d.*", "", reason)] += 1
            if len(first) < _SKIPPED_SHOWN:
                first.append([key, reason])
    return {"count": reasons.total(), "reasons": dict(reasons.most_common()), "first": first}


def _duplicates(source: Source, rows: Rows) -> dict[str, Any]:
    """Groups of rows whose pictures are equal byte for byte."""
    ranked = rows.digests.argsort(kind="stable")
    digests, said = rows.digests[ranked], rows.said[ranked]
    starts = np.flatnonzero(np.append(True, digests[1:] != digests[:-1]))
    counts = np.diff(starts, append=len(ranked))
    contradicting = np.minimum.reduceat(said, starts) != np.maximum.reduceat(said, starts)
    several = np.flatnonzero(counts > 1)
    first = several[ranked[starts[several]].argsort()][:_EXAMPLES]
    examples = [ranked[starts[group] :][: min(counts[group], _EXAMPLES)] for group in first]
    return {
        "groups": len(several),
        "pictures": int(counts[several].sum()),
        "differently_captioned": int(contradicting.sum()),
        "examples": [[source.key(int(row)) for row in group] for group in examples],
    }


def _sizes(source: Source, rows: Rows, size: int) -> dict[str, Any]:
    short, long = np.minimum(rows.widths, rows.heights), np.maximum(rows.widths, rows.heights)
    powers, counts = np.unique(2 ** np.log2(short).astype(int), return_counts=True)
    shapes = np.bincount(np.searchsorted(list(_SHAPES.values()), long / short), minlength=len(_SHAPES))
    lost = 1 - short / long

    def picture(index: int) -> dict[str, Any]:
        return {
            "key": source.key(index),
            "width": int(rows.widths[index]),
            "height": int(rows.heights[index]),
            "area_lost": float(lost[index]),
        }

    return {
        "smallest": picture(int(short.argmin())),
        "median": float(np.median(short)),
        "largest": picture(int(short.argmax())),
        "shorter_side_from": {int(power): int(count) for power, count in zip(powers, counts, strict=True)},
        "enlarged": int((short < size).sum()),
        "shapes": dict(zip(_SHAPES, shapes.tolist(), strict=True)),
        "area_lost": float(np.median(lost)),
        "longest": picture(int(lost.argmax())),
        "formats": dict(rows.formats.most_common()),
        "modes": dict(rows.modes.most_common()),
        "notes": dict(rows.notes.most_common()),
    }


def _captions(source: Source, rows: Rows, words: Text | None, limit: int) -> dict[str, Any]:
    """Lengths and contents of the captions; without a vocabulary one id a byte (and a first space) is the most."""
    limit = words.text_length if words else limit
    ids = rows.lengths["ids"] if words else rows.lengths["bytes"] + 1
    over = np.flatnonzero(ids > limit)
    described: dict[str, Any] = {"count": len(ids), "distinct": len(np.unique(rows.captions))}
    for unit, counted in rows.lengths.items():
        row, _ = rows.place(int(counted.argmax()))
        described[unit] = {"median": float(np.median(counted)), "most": int(counted.max()), "key": source.key(row)}
    described |= {"limit": limit, "over": len(over), "letters": dict(rows.letters.most_common())}
    if words:
        described |= {"padding": float(1 - np.minimum(ids, limit).mean() / limit), "foreign": rows.foreign, "cut": []}
        described["length_for_99_percent"] = int(np.percentile(ids, 99, method="higher"))
        for caption in over[:_EXAMPLES].tolist():
            row, which = rows.place(caption)
            ids = words.tokenizer.encode(source.captions(row)[which], add_special_tokens=False).ids
            kept, lost = (words.decode(part)[:_LONGEST_SHOWN] for part in (ids[:limit], ids[limit:]))
            described["cut"].append({"key": source.key(row), "kept": kept, "lost": lost})
    return described


@torch.inference_mode()
def _draw(source: Source, words: Text | None, model: ImageTokenizer | None, path: Path) -> list[dict[str, str]]:
    """Write five rows as the model will see them, always the same ones; their keys and captions."""
    indices = np.sort(order(0, 0, len(source))[:_EXAMPLES]).tolist()
    pictures = source.images(indices)
    columns, labels = [pictures], [Label("as it will be seen")]
    if model:
        decoded = model.decode(model.encode(pictures.float() / 255))
        columns, labels = [pictures, to_uint8(decoded)], [*labels, Label("after stage 1")]
    clean, examples, drawn = cleaner(words), [], []
    for place, index in enumerate(indices):
        texts = source.captions(index) or ("",)
        seen = words.decode(words.encode(texts[0])) if words else clean(texts[0])
        more = f" [1 of {len(texts)} captions]" if len(texts) > 1 else ""
        examples.append({"key": source.key(index), "caption": seen + more})
        text = (seen if len(seen) <= _LONGEST_SHOWN else seen[:_LONGEST_SHOWN] + " ...") + more
        drawn.append((text, torch.stack([column[place] for column in columns]), labels))
    save(sheet(drawn, side=max(128, source.size), title=printable(source.name)), path)
    return examples


def _warnings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What does not stop a training and yet will spoil it: (what, hint)."""
    captions, sizes, validation = report.get("captions"), report.get("sizes"), report.get("validation")
    if captions and captions["count"] > 1 and captions["distinct"] == 1:
        yield (
            f"all {captions['count']:,} captions are the same",
            "words that never differ teach nothing: give each picture its own caption",
        )
    if captions and "ids" in captions and captions["over"] > captions["count"] / 100:
        yield (
            f"{captions['over']:,} of {captions['count']:,} captions will be cut",
            f"dalle vocab with --length {captions['length_for_99_percent']} would keep 99 % of them whole",
        )
    if captions and captions.get("foreign", 0) > captions["count"] / 20:
        yield (
            f"{captions['foreign']:,} captions take more than one id a character",
            "the vocabulary was learned on other scripts; learn one from these captions with dalle vocab",
        )
    if captions and _REPLACED in captions["letters"]:
        yield (
            f"{captions['letters'][_REPLACED]:,} captions hold the sign that a wrong encoding leaves behind",
            "write the captions anew from their origin, as UTF-8",
        )
    if sizes and sizes["enlarged"] > report["pictures"] / 2:
        yield (
            f"most pictures are smaller than {report['size']} x {report['size']} and will be enlarged",
            f"train at their own size; half of them have {sizes['median']:g} pixels or more on the shorter side",
        )
    if validation and validation["shared"]:
        yield (
            f"{validation['shared']:,} of {validation['used']:,} validation pictures are in the training data too",
            "remove them from one side, or leave --val away: then equal pictures stay on one side",
        )
    if validation and validation["used"] > _used(report):
        yield (
            f"there is more to validate on ({validation['used']:,}) than to train on ({_used(report):,})",
            "swap the two sources, or train on both and leave --val away",
        )


def _used(report: dict[str, Any]) -> int:
    return report["pairs"] or report["pictures"]


def _verdict(report: dict[str, Any], problem: DataError | None, max_bad: float) -> str:
    bad, listed, pictures = report["skipped"]["count"], report["listed"], report["pictures"]
    if problem and _used(report) and bad > max_bad * listed:
        alone = f"; stage 1 alone could train on {pictures:,} pictures" * (listed - pictures <= max_bad * listed)
        return f"not ready: {bad:,} of {listed:,} cannot be used, more than max_bad {100 * max_bad:g} %{alone}"
    if problem:
        return f"not ready: {problem.what}"
    if not report["pairs"]:
        return f"ready for stage 1 (dvae fit): {pictures:,} pictures; stage 2 needs captions, there are none"
    few = "; so few teach a model to repeat them, not to draw new things: find more, or --init_from a trained run"
    return f"ready: {report['pairs']:,} pairs" + few * (report["pairs"] < _FEW)


def _next(report: dict[str, Any], folder: Path, max_bad: float) -> str:
    """The command to go on with; it takes the rows that were found here, where they were kept."""

    def examined(name: str, kept: Path) -> str:
        return shlex.quote(str(kept) if (kept / MANIFEST).exists() else name)

    data, val = examined(report["source"], folder), report["val"] and examined(report["val"], folder / "val")
    dvae, text = (report[name] and shlex.quote(report[name]) for name in ("dvae", "text"))
    if not dvae:
        held = f" --data.val {val}" * bool(val) + f" --data.max_bad {max_bad:g}" * (max_bad != 0.01)
        held += f" --model.config.image_size {report['size']}" * (report["size"] != 64)  # which is the config's
        return f"dvae fit --config dvae/emoji --data.source {data}{held} --data.hold_out null --run runs/my-dvae"
    more = f" --text {text}" * bool(text) + f" --val {val}" * bool(val) + f" --max_bad {max_bad:g}" * (max_bad != 0.01)
    return f"dalle prepare {data} --dvae {dvae}{more} --out runs/my-tokens"


def _sentences(report: dict[str, Any], out: str) -> Iterator[tuple[str, str]]:
    """The report in words: titles (or nothing, below the same title) and sentences."""
    for unit in ("pictures", "pairs"):
        used, listed = report[unit], report["listed"]
        yield unit, f"{listed:,} listed = {used:,} used + {listed - used:,} skipped"
    if report["pictures"] and not report["pairs"]:
        yield "", "no picture has a caption: stage 1 can train on them (dvae fit), stage 2 cannot"
    yield from _named(report["skipped"], f"{out}/{SKIPPED}")
    if strays := report["strays"]:
        yield "strays", f"{len(strays):,} that belong to no row, e.g. {'; '.join(strays[:_EXAMPLES])}"
    if same := report.get("duplicates"):
        differing = f", {same['differently_captioned']:,} of them with different captions"
        found = f"{same['pictures']:,} pictures in {same['groups']:,} groups" + differing
        yield "duplicates", found if same["groups"] else "none"
        for keys in same["examples"]:
            yield "", " = ".join(keys[:3]) + " = ..." * (len(keys) > 3)
    if captions := report.get("captions"):
        yield from _on_captions(captions)
    if sizes := report.get("sizes"):
        yield from _on_sizes(sizes, report["size"], report["pictures"])
    if held := report.get("validation"):
        skipped = f"{held['listed']:,} listed = {held['used']:,} used + {held['skipped']['count']:,} skipped"
        yield "validation", f"{skipped}; {held['shared']:,} of the pictures are in the training data too"
        yield from _named(held["skipped"], f"{out}/val/{SKIPPED}")
    if sides := report.get("split"):
        how = "as given" if report["val"] else f"{VAL_SHARE:.0%} set aside, equal pictures on one side"
        yield "split", f"{sides[0]:,} to train on, {sides[1]:,} to validate on ({how})"
    for place, example in enumerate(report.get("examples", [])):
        yield "examples" * (place == 0), f"{example['key']}: {example['caption'][:_LONGEST_SHOWN] or 'no caption'}"


def _named(skipped: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    if skipped["count"]:
        yield "skipped", _counted(skipped["reasons"])
        for key, reason in skipped["first"]:
            yield "", f"{key}: {reason}"
        if skipped["count"] > len(skipped["first"]):
            yield "", f"... all {skipped['count']:,} in {path}"


def _on_captions(captions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    count = captions["count"]
    yield "captions", f"{count:,}, {captions['distinct']:,} of them distinct ({captions['distinct'] / count:.2%})"
    for unit in ("words", "bytes", "ids"):
        if unit in captions:
            yield "", "{most:,} {0} at most ({key}), median {median:g}".format(unit, **captions[unit])
    limit, over = captions["limit"], captions["over"]
    if "ids" in captions:
        padding = f"{captions['padding']:.0%} of all ids are padding"
        yield "", f"{over:,} are longer than {limit} ids and will be cut; {padding}"
        for cut in captions["cut"]:
            yield "", f"{cut['key']}: {cut['kept']} [cut here] {cut['lost']}"
    else:
        yield "", f"{over:,} have {limit} bytes or more and may be cut; --text text.json counts in ids"
    for title, of_scripts in (("scripts", True), ("characters", False)):
        found = {kind: number for kind, number in captions["letters"].items() if (kind not in _MARKS) == of_scripts}
        if found:
            yield title, "captions with " + ", ".join(f"{kind} {n / count:.1%}" for kind, n in found.items())


def _on_sizes(sizes: dict[str, Any], size: int, pictures: int) -> Iterator[tuple[str, str]]:
    small, large = ("{width} x {height} ({key})".format(**sizes[which]) for which in ("smallest", "largest"))
    yield "sizes", f"smallest {small}, largest {large}, median of the shorter side {sizes['median']:g}"
    bars = sizes["shorter_side_from"]
    for power, number in bars.items():
        yield "", f"{power:>6} to {2 * power - 1:<6} {'#' * -(-40 * number // max(bars.values())):<40} {number:,}"
    yield "", f"{sizes['enlarged']:,} of {pictures:,} are smaller than {size} and will be enlarged"
    yield "shapes", _counted({shape: number for shape, number in sizes["shapes"].items() if number})
    worst = f"{sizes['longest']['area_lost']:.1%} at worst ({sizes['longest']['key']})"
    yield "", f"the central square loses {sizes['area_lost']:.1%} of the area (median), {worst}"
    for title in ("formats", "modes", "notes"):
        if sizes[title]:
            yield title, _counted(sizes[title])


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in numbers.items())


def _printable(text: str) -> str:
    """`text` without what could move the cursor or turn the line round, in letters that the terminal has."""
    plain = "".join(character for character in text if character.isprintable() or character == "\n")
    encoding = sys.stdout.encoding or "ascii"
    return plain.encode(encoding, "backslashreplace").decode(encoding)
