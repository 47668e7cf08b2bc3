"""`dalle`: train, sample and look at the text-to-image transformer. Each command opens its rooms when it is called."""

import sys
from collections.abc import Sequence

from dvae.commands import dispatch

HELP = """\
dalle: text to images, stage 2 of DALL-E

  dalle demo [--out runs/demo]                          both stages from nothing to ranked pictures, in minutes
  dalle vocab DATA --size 4096 --out text.json          learn a vocabulary from captions
  dalle prepare DATA --dvae RUN --text text.json --out TOKENS
                                                        pictures and captions -> token files, once
  dalle fit --config CONFIG --data.tokens TOKENS [--run RUN] [--ckpt_path last]
                                                        train; --help lists every setting
  dalle validate --config CONFIG --ckpt_path best       losses on the validation pairs
  dalle test --config CONFIG --ckpt_path best           the same under the name of a test
  dalle sample RUN "a prompt" --count 16 --keep 4 --out DIR
                                                        draw pictures and rank them without CLIP

`dalle COMMAND --help` says more; --debug anywhere shows where an error arose.
exit codes: 0 done, 2 usage or config, 3 data, 4 artefact, 5 environment, 6 numerics, 130 and 143 stopped
"""


def fit(args: Sequence[str]) -> None:
    from dalle.train import main

    main(args)


def vocab(data: str, out: str = "text.json", size: int = 16384, length: int = 256, max_bad: float = 0.01) -> None:
    """Learn a byte-level BPE vocabulary from the captions of a data source.

    Args:
        data: any data source: scenes, a folder, tars.
        out: the file to write.
        size: ids, the 256 bytes included.
        length: text ids per caption; longer captions are cut.
        max_bad: share of rows without picture or caption up to which the work is done.
    """
    from dalle import prepare

    prepare.vocab(data, out, size, length, max_bad)


def prepare(
    data: str,
    dvae: str = "",
    text: str = "text.json",
    out: str = "tokens",
    val: str | None = None,
    val_share: float = 0.05,
    length: int | None = None,
    batch: int = 64,
    max_bad: float = 0.01,
) -> None:
    """Turn pictures and captions into token files for `dalle fit`.

    Args:
        data: any data source: scenes:train, a folder, tars.
        dvae: run folder or artefact folder of the image tokenizer.
        text: the vocabulary: a file that `dalle vocab` wrote, or any tokenizer.json.
        out: the folder to write; it must be empty, or what an interrupted call has left.
        val: another source to validate on; without it a share of `data` is set aside.
        val_share: that share, chosen by a digest of the rows' names.
        length: text ids per caption, where the vocabulary is a tokenizer.json that does not say.
        batch: pictures encoded at a time.
        max_bad: share of unusable rows up to which the work is done.
    """
    from dalle import prepare
    from dvae.errors import UserError

    if not dvae:
        raise UserError("no image tokenizer is given", "name the run of stage 1: --dvae RUN")
    prepare.prepare(data, dvae, text, out, val, val_share, length, batch, max_bad)


def sample(
    run: str,
    prompt: str | None = None,
    prompts: str | None = None,
    count: int = 16,
    keep: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    rerank: str = "half-pmi",
    seed: int = 0,
    exact: bool = False,
    out: str = "samples",
) -> None:
    """Draw pictures for a prompt and keep those that the model itself ranks best.

    Args:
        run: run folder or artefact folder of stage 2.
        prompt: what to draw.
        prompts: a text file with one prompt a line, instead of `prompt`.
        count: candidates per prompt.
        keep: how many of them are written, best first.
        temperature: above 1 more varied, below 1 more careful.
        top_k: draw from the k most likely codes only.
        top_p: draw from the most likely codes that together have this probability.
        guidance: scale of classifier-free guidance; 1 is none.
        rerank: likelihood, pmi, half-pmi, contrast or none.
        seed: the same seed draws the same pictures.
        exact: bit-equal pictures whatever is drawn beside them; slower.
        out: folder for the pictures, a labelled grid and a JSON of how they were made.
    """
    from dalle.samples import draw_samples

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    settings |= {"rerank": rerank, "exact": exact}
    draw_samples(run, prompt, prompts, count, keep, seed, out, settings)


def demo(out: str = "runs/demo", seed: int = 0, quick: bool = False) -> None:
    """Train both stages on drawn scenes, from nothing to ranked pictures, and say how many are true.

    Args:
        out: folder for everything that is made; it must not hold a demo yet.
        seed: of the whole demo.
        quick: a minute's run that shows every step but learns little.
    """
    from dalle.demo import demo

    demo(out, seed, quick)


COMMANDS = {"vocab": vocab, "prepare": prepare, "sample": sample, "demo": demo}


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    return dispatch("dalle", HELP, COMMANDS, fit, args, optional={"sample": {"prompt": "what to draw"}})


if __name__ == "__main__":
    sys.exit(main())
