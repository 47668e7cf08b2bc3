"""`dalle`: train, sample and look at the text-to-image transformer."""

import sys
from collections.abc import Sequence

from dvae.commands import dispatch

HELP = """\
dalle: text to images, stage 2 of DALL-E

  dalle demo [--out runs/demo]                          both stages from nothing to ranked pictures, in minutes
  dalle check DATA [--out DIR]                          what can be used, what cannot and why
  dalle vocab DATA --size 4096 --out text.json          learn a vocabulary from captions
  dalle prepare DATA --dvae RUN --text text.json --out TOKENS
                                                        pictures and captions -> token files, once
  dalle describe CONFIG [--model.depth 8]               parameters, memory and FLOPs of a training, before it begins
  dalle fit --config CONFIG --data.tokens TOKENS [--run RUN] [--ckpt_path last]
                                                        train; --help lists every setting
  dalle validate --config CONFIG --ckpt_path best       losses on the validation pairs
  dalle test --config CONFIG --ckpt_path best           the same under the name of a test
  dalle sample RUN "a prompt" --count 16 --keep 4 --out DIR
                                                        draw pictures and rank them without CLIP
  dalle complete RUN "a caption" --image I --rows 8     go on with a picture; also --mask, --extend, --variation
  dalle caption RUN IMAGES                              say what pictures show
  dalle score RUN IMAGE "text" "text" ...               which text fits a picture, or which pictures fit a text
  dalle evaluate RUN DATA [--out DIR]                   does it work: losses, best-of-N for each ranker, controls
  dalle compare RUN DATA [--out DIR]                    drawn pictures beside true and nearest training pictures
  dalle diagnose RUN [DATA] [--out DIR]                 which stage is at fault, and what to do next
  dalle report RUN [--out FILE]                         one page of a run: curves, pictures, settings, results
  dalle shrink RUN --out DIR                            a copy with 16-bit weights, half the size, to be shared

`dalle COMMAND --help` says more; --debug anywhere shows where an error arose.
exit codes: 0 done, 2 usage or config, 3 data, 4 artefact, 5 environment, 6 numerics, 130 and 143 stopped
"""

COMMANDS = {
    "check": "dalle.check:check",
    "vocab": "dalle.prepare:vocab",
    "prepare": "dalle.prepare:prepare",
    "describe": "dalle.describe:describe",
    "sample": "dalle.samples:sample",
    "complete": "dalle.complete:complete",
    "caption": "dalle.captions:caption",
    "score": "dalle.captions:score",
    "evaluate": "dalle.evaluate:evaluate",
    "compare": "dalle.compare:compare",
    "diagnose": "dalle.diagnose:diagnose",
    "report": "dalle.report:report",
    "shrink": "dalle.shrink:shrink",
    "demo": "dalle.demo:demo",
}


OPTIONAL = {
    "sample": {"prompt": "what to draw"},
    "diagnose": {"data": "the data that it was trained on; without it, what the run's own config leads to"},
}


def main(args: Sequence[str] | None = None) -> int:
    return dispatch("dalle", HELP, COMMANDS, "dalle.train:main", sys.argv[1:] if args is None else args, OPTIONAL)


if __name__ == "__main__":
    sys.exit(main())
