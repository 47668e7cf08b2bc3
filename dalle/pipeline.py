"""Caption -> ranked pictures: vocabulary, transformer, image tokenizer and scorer in one object.

    pipeline = dalle.load("runs/demo/dalle")
    best = pipeline("a red circle above a small blue square", count=16, keep=4)[0]
    best.pil().show()

The command, the evaluation, the validation pictures and the notebooks all call this one object. It runs without
Lightning.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor

from dalle.gpu import Replayed
from dalle.model import DALLE, DALLEConfig
from dalle.packing import check_precision, packed, supported
from dalle.rerank import COMBINED, NAMES, SEEN, Evidence, Scorer, distinct_first, partly, rank, scorer, stages
from dalle.sampling import Blend, Sampled, sample, sample_pruned
from dalle.text import Text
from dvae import artefact
from dvae.errors import ArtefactError, UserError, warn
from dvae.images import to_uint8
from dvae.tokenizer import ImageTokenizer
from dvae.tokenizer import load as load_dvae

KIND = "dalle"
CAPTIONS = 2048  # of the training set that an artefact carries for the contrast score


@dataclass(frozen=True)
class Picture:
    """One drawn picture.

    image: uint8 `(3, H, W)`. tokens: int64 `(h, w)`. number: which candidate of its prompt and seed it is, from 0.
    score: what it was ranked by, higher is better.
    """

    image: Tensor
    tokens: Tensor
    caption: str
    seed: int
    number: int
    score: float

    def pil(self) -> Image.Image:
        return Image.fromarray(self.image.permute(1, 2, 0).numpy())


class Pipeline(ModelHubMixin, library_name="trainable-dalle", tags=["text-to-image"], license="mit"):
    """Draws pictures for captions and ranks them without CLIP.

    Args:
        captions: a sample of those that it was trained on.
        source: where it was loaded from.
        knows_null: whether it was trained with dropped captions, so that guidance, pmi and half-pmi mean something.
        weights: of the scores in `combined`, fitted for this model; None for the default (`dalle.rerank`).
        precision: that it draws and scores in, or the next that the machine has (`dalle.packing.supported`).
    """

    def __init__(
        self,
        model: DALLE,
        text: Text,
        tokenizer: ImageTokenizer,
        captions: Sequence[str],
        source: Path,
        knows_null: bool = True,
        weights: Mapping[str, float] | None = None,
        precision: str = "float32",
    ):
        self.model, self.text, self.tokenizer, self.precision = model, text, tokenizer, check_precision(precision)
        self.captions, self.source, self.knows_null = list(captions), source, knows_null
        self.weights = dict(weights) if weights else None
        self.captions_ids = text.encode(self.captions)
        self._packed: tuple[list[tuple[int, int]], DALLE | Replayed] | None = None

    @property
    def packed(self) -> DALLE | Replayed:
        """The model as it draws and scores; made when it is first asked for, and again when weights have changed."""
        known = list(self.model.parameters())
        weights = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in known]
        if self._packed is None or self._packed[0] != weights:
            self.precision = supported(self.precision, self.model)
            fast = packed(self.model, self.precision)
            trained = known[0].requires_grad  # and soon other: compiling would not pay
            self._packed = weights, Replayed(fast) if known[0].is_cuda and not trained else fast
        return self._packed[1]

    @property
    def ranker(self) -> str:
        """By what pictures are ranked unless told otherwise: combined where weights were fitted or the model captions,
        half-pmi where it does not, likelihood where it never learned the null prompt either."""
        if self.weights is not None or self.model.config.both_orders:
            return COMBINED
        return "half-pmi" if self.knows_null else "likelihood"

    def scorer(self, name: str) -> Scorer:
        """The scorer of that name, see `dalle.rerank`."""
        return scorer(
            name, self.captions_ids, self.text.null(), self.repaint, self.weights, self.model.config.both_orders
        )

    def evidence(self, text_ids: Tensor, sampled: Sampled) -> Evidence:
        """What the model says about the candidates of one caption (1, T): every score, each part computed once."""
        known = self.captions_ids, self.text.null(), self.repaint, self.weights
        return Evidence(self.packed, text_ids, sampled, *known)

    def repaint(self, tokens: Tensor) -> Tensor:
        """Paint tokens (N, h, w), and read the pictures again, as a viewer would see them."""
        return self.tokenizer.encode(to_uint8(self.tokenizer.decode(tokens.cpu())).float() / 255).to(tokens.device)

    def sample(self, captions: Sequence[str], count: int, seeds: int | Sequence[int] = 0, **settings: Any) -> Sampled:
        """`count` candidates for each caption, unranked; see `dalle.sampling.sample` for the settings."""
        ids = self.text.encode(captions)
        return sample(self.packed, ids, count, null_ids=self.text.null(), seeds=seeds, **settings)

    @torch.inference_mode()
    def __call__(
        self,
        caption: str,
        count: int = 16,
        keep: int = 4,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        blend: tuple[str, float] | None = None,
        rerank: str | None = None,
        prune: bool = False,
        exact: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Picture]:
        """Draw `count` pictures for the caption and return the `keep` that the scorer likes best, best first.

        Without `rerank` that is `ranker`. `blend` is another caption and its share, from 0 to 1: pictures between the
        two, drawn from the geometric mean of both distributions and ranked by the first. With `prune` those that look
        hopeless on the way are not drawn to their end (`dalle.rerank.stages`); the others are what they would be.
        A picture that was drawn twice is kept twice only where there are not enough others.
        The same seed gives the same pictures, whatever else is drawn beside them.
        """
        if not 1 <= keep <= count:
            raise UserError(f"keep is {keep} of count {count}", "keep from 1 to as many pictures as are drawn")
        for words in (caption, *(() if blend is None else blend[:1])):
            self.check_words(words)
        score = self.scorer(self.ranker if rerank is None else rerank)
        ids, numbers = self.text.encode(caption), torch.arange(count)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        if prune:
            halts = stages(count, math.prod(self.model.config.grid))
            left = min((left for _, left in halts), default=count)
            if exact or blend is not None or keep > left:
                raise UserError(
                    f"prune draws {left} of {count} pictures of one caption to their end, and not bit for bit",
                    f"keep at most {left}, without exact and blend, or do not prune",
                )
            null_ids = self.text.null()
            hope = partly(null_ids if self.knows_null else None)
            settings |= {"null_ids": null_ids, "seed": seed, "progress": progress}
            sampled, numbers = sample_pruned(self.packed, ids, count, halts, hope, **settings)
        else:
            other = None if blend is None else Blend(self.text.encode(blend[0]), blend[1])
            sampled = self.sample([caption], count, seed, blend=other, exact=exact, progress=progress, **settings)
        scores = score(self.packed, ids, sampled)
        order = distinct_first(rank(scores), sampled.tokens)[:keep]
        return self._painted(sampled, order, caption, seed, numbers, scores)

    @torch.inference_mode()
    def unconditional(self, count: int = 4, seed: int = 0, **settings: Any) -> list[Picture]:
        """Pictures without words, from the null prompt, in the order of drawing; see `dalle.sampling.sample` for the
        settings. Needs a model that was trained with dropped captions."""
        if not self.knows_null:
            raise UserError(
                "this model was trained without dropped captions, so it draws nothing without words",
                "give a caption, or train it with --data.caption_dropout 0.1",
            )
        sampled = self.sample([""], count, seed, **settings)
        order = torch.arange(count)
        return self._painted(sampled, order, "", seed, order, torch.zeros(count))

    def _painted(
        self, sampled: Sampled, order: Tensor, caption: str, seed: int, numbers: Tensor, scores: Tensor
    ) -> list[Picture]:
        images = to_uint8(self.tokenizer.decode(sampled.tokens[order]))
        return [
            Picture(image, sampled.tokens[k], caption, seed, int(numbers[k]), float(scores[k]))
            for image, k in zip(images, order.tolist(), strict=True)
        ]

    def check_words(self, caption: str) -> None:
        """Raise UserError for a caption that says nothing to this model."""
        if not (self.text.encode(caption) < self.text.vocab_size).any():
            raise UserError(
                f"the caption {caption!r} says nothing",
                "say what to draw; from Python, Pipeline.unconditional draws without words",
            )

    def unread(self, caption: str) -> set[str]:
        """Characters of a caption that none of the sample of training captions has; empty without such a sample."""
        known = set("".join(map(self.text.clean, self.captions)))
        return {c for c in self.text.clean(caption) if not c.isspace()} - known if known else set()

    def _save_pretrained(self, save_directory: Path) -> None:
        about = artefact.load(self.source, KIND)
        save(save_directory, self.model, self.text, self.captions, about.parts["dvae"], about.about, self.weights)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, cache_dir: Any, force_download: bool, local_files_only: bool,
                         token: Any, revision: str | None, **_: Any) -> "Pipeline":  # fmt: skip
        if Path(model_id).is_dir():
            return load(model_id)
        from huggingface_hub import snapshot_download

        return load(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        )


def warn_of_null(drawer: Pipeline, guidance: float, rerank: str | None) -> None:
    """Tell the user of settings that need the null prompt, of a model that never learned it."""
    if not drawer.knows_null and (guidance != 1 or (rerank or "").removesuffix(SEEN) in ("pmi", "half-pmi")):
        warn(
            "this model was trained without dropped captions: guidance, pmi and half-pmi mean nothing to it",
            "draw with guidance 1 and rank by likelihood or contrast, or train it with --data.caption_dropout 0.1",
        )


def save(
    folder: str | Path,
    model: DALLE,
    text: Text,
    captions: Sequence[str],
    dvae: Path,
    about: dict[str, Any],
    weights: Mapping[str, float] | None = None,
) -> str:
    """Write the artefact of a trained transformer with all that it needs, and the `weights` of its scores where some
    were fitted; returns its digest."""
    files = {"text": text.to_json(), "captions": json.dumps(list(captions), ensure_ascii=False)}
    if weights is not None:
        files["ranker"] = json.dumps({"weights": dict(weights)})
    return artefact.save(
        folder,
        KIND,
        asdict(model.config),
        model.state_dict(),
        files=files,
        parts={"dvae": dvae},
        about=about,
    )


def load_model(run: str | Path) -> tuple[DALLE, artefact.Artefact]:
    """The transformer of a run or artefact folder, in eval mode, and the artefact it came from."""
    found = artefact.load(artefact.find(run, KIND), KIND)
    try:
        model = DALLE(DALLEConfig(**found.config))
        model.load_state_dict(found.tensors)
    except (TypeError, RuntimeError, UserError) as error:
        raise ArtefactError(
            f"{run} does not hold a transformer of this version: {str(error).splitlines()[0]}",
            "train it again, or use the version of this project that wrote it",
        ) from error
    return model.eval().requires_grad_(False), found


def load(run: str | Path, precision: str = "float32") -> Pipeline:
    """The pipeline of a run folder or an artefact folder. No code of the artefact runs, and no pickle is read.

    Args:
        precision: that it draws and scores in: float32, or the faster bfloat16 and int8 (`dalle.packing`).
    Raises:
        ArtefactError: it is missing, damaged, of another kind, or its two stages do not belong together.
    """
    model, found = load_model(run)
    c = model.config
    for role in ("text", "captions"):
        if role not in found.files:
            raise ArtefactError(f"{run} carries no {role}", "save it again with this version of the project")
    text = Text.from_json(found.files["text"], name=f"the vocabulary of {run}")
    if "dvae" not in found.parts:
        raise ArtefactError(f"{run} carries no image tokenizer", "save it again with this version of the project")
    tokenizer = load_dvae(found.parts["dvae"])
    if (text.vocab_size, text.text_length) != (c.vocab_text, c.text_length):
        raise ArtefactError(
            f"the transformer reads {c.vocab_text} text ids in {c.text_length} places, its vocabulary has "
            f"{text.vocab_size} in {text.text_length}",
            "the two do not belong together; use the artefact as it was written",
        )
    if (tokenizer.vocab_size, tokenizer.grid) != (c.vocab_image, tuple(c.grid)):
        raise ArtefactError(
            f"the transformer draws {c.vocab_image} codes on a {c.grid} grid, the image tokenizer has "
            f"{tokenizer.vocab_size} on {tokenizer.grid}",
            "the two do not belong together; use the artefact as it was written",
        )
    try:
        captions = json.loads(found.files["captions"])
    except ValueError:
        captions = None
    if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
        raise ArtefactError(f"the captions of {run} are not a list of texts", "save it again")
    knows_null = found.about.get("caption_dropout") != 0
    weights = _weights(found, run)
    return Pipeline(model, text, tokenizer, captions, artefact.find(run, KIND), knows_null, weights, precision)


def _weights(found: artefact.Artefact, run: str | Path) -> dict[str, float] | None:
    """Of the scores in `combined`, where the artefact carries some."""
    if "ranker" not in found.files:
        return None
    try:
        weights = json.loads(found.files["ranker"])["weights"]
        if not weights or not all(name in NAMES and name != COMBINED for name in weights):
            raise ValueError
        return {name: float(weight) for name, weight in weights.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{run} carries no weights of known scores to rank by", "save it again") from error
