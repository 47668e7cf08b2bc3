"""A 16-bit copy is half as large, loads like any artefact, and says nearly the same."""

import pytest
import torch

from dalle import pipeline
from dalle.shrink import shrink
from dalle.symptoms import teacher_forced
from dvae import artefact
from dvae.errors import UserError


def test_a_shrunk_model_is_half_as_large_and_nearly_the_same(tmp_path, tiny_dalle):
    shrink(str(tiny_dalle), str(tmp_path / "small"))
    before, after = pipeline.load(tiny_dalle), pipeline.load(tmp_path / "small")
    for a, b in ((before.model, after.model), (before.tokenizer, after.tokenizer)):
        for (name, old), (_, new) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            assert new.dtype == torch.float32 and torch.equal(new, old.half().float()), name
    old, new = (artefact.load(drawer.source, "dalle") for drawer in (before, after))
    weights = [sum(tensor.nbytes for tensor in found.tensors.values()) for found in (old, new)]
    assert weights[1] * 2 == weights[0]
    assert (new.about, new.files, new.config) == (old.about, old.files, old.config)
    ids = before.text.encode(before.captions[:8])
    tokens = torch.randint(0, before.tokenizer.vocab_size, (8, *before.tokenizer.grid))
    scores = [teacher_forced(drawer.model, ids, tokens) for drawer in (before, after)]
    assert (scores[0].image - scores[1].image).abs().max() < 0.01
    assert not torch.equal(scores[0].image, scores[1].image)


def test_nothing_is_overwritten(tmp_path, tiny_dalle):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        shrink(str(tiny_dalle), str(tmp_path / "there"))
