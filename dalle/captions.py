"""The commands `caption` and `score`: what pictures show, which text fits a picture, which pictures fit a text.

    describe(pipeline, images, count=3)                        # captions, each with ln p(text | image)
    probabilities(pipeline, images, ["a cat", "a dog"])        # zero-shot classification without CLIP
    fits(pipeline, images, "a red circle")                     # one number a picture, to search by

`images` are floats `(B, 3, H, W)` in [0, 1]. A model of both orders says p(text | image) itself; any model says
p(image | text), and Bayes' rule leads from either to the posterior of a text among others. B pictures, P texts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from dalle import pipeline
from dalle.caption import beam, check_order, check_search, log_priors, sampled
from dalle.pipeline import Pipeline
from dalle.rerank import log_likelihoods, text_log_likelihoods
from dvae import artefact, files
from dvae.data import check_outside, check_share, open_source
from dvae.errors import EnvironmentProblem, NumericsError, UserError, warn
from dvae.images import SUFFIXES, open_image, square
from dvae.inspect import batches
from dvae.listing import printable

BYS, PRIORS = ("likelihood", "caption"), ("uniform", "model")
_METHODS = {"beam": ("width",), "sampled": ("temperature", "top_k", "top_p", "seed")}  # and the settings of each
_WIDTH = 8
_SHOWN = 10  # pictures that a search names
_LISTS = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv")  # files that are sources of many pictures


class Caption(NamedTuple):
    """A caption in words, and its score, ln p(text | image) in nats."""

    text: str
    score: float


def caption(
    run: str,
    images: str,
    method: str = "beam",
    count: int = 1,
    width: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    out: str | None = None,
) -> None:
    """Say what pictures show, each caption with its score ln p(caption | picture); needs a model of both orders.

    Args:
        run: run folder or artefact folder of stage 2, trained with --model.image_first.share.
        images: a picture, or any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        method: beam searches the likeliest captions, sampled draws some and puts the likeliest first.
        count: captions of each picture; sampled, how many are drawn, and those that differ are told.
        width: beginnings that the beam keeps; null: 8, or count where that is more.
        temperature: sampled, above 1 more varied, below 1 more careful; null: 1.
        top_k: sampled, draw from the k most likely ids only.
        top_p: sampled, draw from the most likely ids that together have this probability.
        seed: sampled, the same seed draws the same captions; null: 0.
        out: a JSON file for captions, scores and how they were made.
    """
    given = {"width": width, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = {"method": method, "count": count, **_settings(method, count, given)}
    drawer = pipeline.load(run)
    check_order(drawer.model)
    if out is not None:
        _check_out(out, images)
    told = []
    for keys, pictures in _pictures(drawer, images, "captioning"):
        told += zip(keys, describe(drawer, pictures, **settings), strict=True)
    for key, captions in told:
        for each in captions:
            print(f"{key}  {each.score:8.2f}  {printable(each.text)}")
    if out is not None:
        made = {"images": printable(images), **settings, "artefact": artefact.digest(drawer.source)}
        named = [{"key": key, "captions": [each._asdict() for each in captions]} for key, captions in told]
        files.write_json(out, {**made, "pictures": named})
        print(f"wrote {printable(out)}")


def score(
    run: str,
    images: str,
    texts: list[str],
    by: str = "likelihood",
    prior: str | None = None,
    keep: PositiveInt | None = None,
) -> None:
    """How probable is each of some texts for a picture; or, of one text and many pictures, which pictures fit it best.

    Args:
        run: run folder or artefact folder of stage 2.
        images: a picture, to choose between texts; or any data source to search: scenes:val, a folder, a listing, tars,
            Parquet files, a Hub data set.
        texts: two texts or more for a picture, one for a data source.
        by: likelihood asks for p(picture | text), which every model has, and which was right more often on scenes;
            caption for p(text | picture), which needs a model of both orders.
        prior: between texts, uniform takes each for as probable before the picture is seen; model goes by how often the
            model would say it. Null: uniform.
        keep: how many are shown, best first; null: all texts, or ten pictures.
    """
    one = _is_picture(images)
    if one and len(texts) < 2:
        hint = 'for instance: dalle score RUN IMAGE "a cat" "a dog"; to search, give one text and a folder of pictures'
        raise UserError("there is one text, and nothing to tell it from" if texts else "there are no texts", hint)
    if not one and len(texts) != 1:
        raise UserError(
            f"{len(texts)} texts for many pictures" if texts else "there is no text",
            'give one text to search by: dalle score RUN FOLDER "a cat"; or one picture to choose between texts',
        )
    if not one and prior is not None:
        raise UserError("--prior weighs texts against each other, and there is one", "leave it away to search")
    for text in texts:
        try:
            text.encode()  # the shell hands over any bytes
        except UnicodeEncodeError as error:
            raise UserError(f"a text is not UTF-8 (character {error.start})", "type it as UTF-8") from error
    drawer = pipeline.load(run)
    _check_by(drawer, by)
    _warn_of_cut(drawer, texts, _encoded(drawer, texts))
    if one:
        ((_, pictures),) = _pictures(drawer, images, "")
        (chances,) = probabilities(drawer, pictures, texts, by, prior or PRIORS[0])
        for chance, text in sorted(zip(chances, texts, strict=True), key=lambda pair: -pair[0])[:keep]:
            print(f"{chance:7.2%}  {printable(text)}")
        return
    found = []
    for keys, pictures in _pictures(drawer, images, "searching"):
        found += zip(fits(drawer, pictures, texts[0], by), keys, strict=True)
    for fit, key in sorted(found, key=lambda pair: -pair[0])[: keep or _SHOWN]:
        print(f"{fit:8.2f}  {key}")


def describe(
    drawer: Pipeline, images: Tensor, method: str = "beam", count: int = 1, **settings: Any
) -> list[list[Caption]]:
    """Captions of pictures (B, 3, H, W) in [0, 1], those of each picture best first, no two of the same words.

    Ids that spell the same words are one caption, with the score of the likeliest of them.

    Args:
        method, count, settings: as those of the command; beam has width, sampled temperature, top_k, top_p and seed.
    Raises:
        UserError: the model reads words first only, pictures of another size, a setting out of its range, or one that
            the method has no use for.
        NumericsError: the model's logits are not finite.
    """
    settings = _settings(method, count, settings)
    tokens = _tokens(drawer, images)
    if method == "beam":
        check_search(settings["width"], count)
        found = beam(drawer.packed, tokens, settings["width"], settings["width"])  # more, for some may spell the same
    else:
        found = sampled(drawer.packed, tokens, count, **settings)
    told = []
    for each in found:
        words: dict[str, float] = {}
        for ids, logprob in zip(each.text_ids, each.logprobs.tolist(), strict=True):
            words.setdefault(drawer.text.decode(ids), logprob)
        told.append([Caption(*pair) for pair in words.items()][:count])
    return told


def probabilities(
    drawer: Pipeline, images: Tensor, texts: Sequence[str], by: str = "likelihood", prior: str = "uniform"
) -> list[list[float]]:
    """The posterior of each of P texts for each of the pictures (B, 3, H, W) in [0, 1]: B rows that sum to one.

    | by         | prior uniform                       | prior model                           |
    |------------|-------------------------------------|---------------------------------------|
    | caption    | p(text given image) / p(text)       | p(text given image)                   |
    | likelihood | p(image given text)                 | p(image given text) p(text)           |

    each divided by its sum over the texts. The two of a column are equal by Bayes' rule; the model computes them from
    different orders.

    Args:
        by, prior: as those of the command.
    Raises:
        UserError: a text is empty, or two are the same to the model; or as `describe`.
        NumericsError: the model's logits are not finite.
    """
    _check_by(drawer, by)
    if prior not in PRIORS:
        raise UserError(f"prior is {prior!r}", f"choose one of {', '.join(PRIORS)}")
    ids = _encoded(drawer, texts)
    logs = _logs(drawer, ids, _tokens(drawer, images), by)
    if (by, prior) == ("caption", "uniform"):
        logs = logs - log_priors(drawer.packed, ids)
    elif (by, prior) == ("likelihood", "model"):
        logs = logs + log_priors(drawer.packed, ids)
    return logs.softmax(1).tolist()


def fits(drawer: Pipeline, images: Tensor, text: str, by: str = "likelihood") -> list[float]:
    """How well each of the pictures (B, 3, H, W) in [0, 1] fits a text, in nats; comparable between pictures.

    By caption it is ln p(text | image); by likelihood ln p(image | text) - ln p(image | null), without which plain
    pictures would fit everything.

    Raises:
        UserError: the text is empty; or the model never learned the null prompt; or as `describe`.
        NumericsError: the model's logits are not finite.
    """
    _check_by(drawer, by)
    if by == "likelihood" and not drawer.knows_null:
        raise UserError(
            "this model was trained without dropped captions, so likelihoods of pictures cannot be compared",
            "search with --by caption, of a model of both orders, or train with --data.caption_dropout 0.1",
        )
    ids, tokens = _encoded(drawer, [text]), _tokens(drawer, images)
    logs = _logs(drawer, ids, tokens, by)
    if by == "likelihood":
        logs = logs - _logs(drawer, drawer.text.null(), tokens, by)
    return logs[:, 0].tolist()


def _logs(drawer: Pipeline, ids: Tensor, tokens: Tensor, by: str) -> Tensor:
    """ln p(text | image) or ln p(image | text), (B, P) float64, of texts (P, T) and pictures (B, h, w)."""
    logs = (text_log_likelihoods if by == "caption" else log_likelihoods)(drawer.packed, ids, tokens).T.double()
    if not torch.isfinite(logs).all():
        raise NumericsError(
            "the model's logits are not finite",
            "the weights are damaged or diverged in training: use an earlier checkpoint, or float32",
        )
    return logs


@torch.inference_mode()
def _tokens(drawer: Pipeline, images: Tensor) -> Tensor:
    return drawer.tokenizer.encode(images)


def _check_by(drawer: Pipeline, by: str) -> None:
    if by not in BYS:
        raise UserError(f"by is {by!r}", f"choose one of {', '.join(BYS)}")
    if by == "caption":
        check_order(drawer.model)


def _encoded(drawer: Pipeline, texts: Sequence[str]) -> Tensor:
    """Ids (P, T) of texts that all say something, and something different."""
    if isinstance(texts, str) or not texts:
        raise UserError(f"texts are {texts!r}", "give a list of one or more")
    ids, said = drawer.text.encode(texts), {}
    for text, row, length in zip(texts, ids, drawer.text.lengths(texts).tolist(), strict=True):
        if not length:
            raise UserError(f"a text is empty: {text!r}", "leave it away, or write what a picture may show")
        if (other := said.get(tuple(row.tolist()))) is not None:
            what = f"{text!r} is given twice" if other == text else f"{other!r} and {text!r} are the same to this model"
            raise UserError(what, "give each text once")
        said[tuple(row.tolist())] = text
    return ids


def _warn_of_cut(drawer: Pipeline, texts: Sequence[str], ids: Tensor) -> None:
    for length, row in zip(drawer.text.lengths(texts).tolist(), ids, strict=True):
        if length > drawer.text.text_length:
            read = drawer.text.decode(row)
            warn(
                f"a text has {length} ids, this model reads {drawer.text.text_length}: {read!r} is all that counts",
                "say it shorter; how long captions may be is chosen by dalle prepare --length",
            )


def _settings(method: str, count: int, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a method, of those that were given; None is not given."""
    if method not in _METHODS:
        raise UserError(f"method is {method!r}", f"choose one of {', '.join(_METHODS)}")
    given = {name: value for name, value in given.items() if value is not None}
    if unused := given.keys() - set(_METHODS[method]):
        names = ", ".join(sorted(unused))
        raise UserError(f"{method} has no use for {names}", f"it has {', '.join(_METHODS[method])}; leave {names} away")
    return {name: given.get(name, _default(name, count)) for name in _METHODS[method]}


def _default(name: str, count: int) -> float | None:
    return {"width": max(_WIDTH, count), "temperature": 1.0, "seed": 0}.get(name)


def _is_picture(images: str) -> bool:
    """Whether a name is that of one picture, not of a source of many; also where no such file is there."""
    path = Path(images)
    suffix = path.suffix.lower()
    return not path.is_dir() and (suffix in SUFFIXES or path.is_file() and suffix not in _LISTS)


def _pictures(drawer: Pipeline, images: str, what: str) -> Iterator[tuple[list[str], Tensor]]:
    """The keys of some pictures and the pictures, (B, 3, H, W) in [0, 1], until there are no more."""
    size = drawer.tokenizer.config.image_size
    if _is_picture(images):
        yield [printable(images)], square(open_image(Path(images)), size)[None].float() / 255
        return
    source = open_source(images, size)
    check_share(source, max_bad=1)
    if bad := source.listed - len(source):
        example = "{}: {}".format(*next(source.skipped()))
        warn(f"{bad} of {source.listed} cannot be used, e.g. {example}", "they are left out; mend or remove them")
    start = 0
    for pictures in batches(drawer.tokenizer, source, list(range(len(source))), what):
        yield [source.key(row) for row in range(start, start + len(pictures))], pictures
        start += len(pictures)


def _check_out(out: str, images: str) -> None:
    """Raise where the file `out` cannot be written, or is or would become a part of the pictures."""
    path = Path(out)
    check_outside(out, images)
    if path.is_dir():
        raise UserError(f"{out} is a folder", "name a file, such as captions.json")
    if path.exists() and Path(images).exists() and path.samefile(images):
        raise UserError(f"{out} is what is read", "write to another file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = EnvironmentProblem(f"{out} cannot be written: {error.strerror}", "choose another file with --out")
        raise problem from error
