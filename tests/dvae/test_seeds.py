import itertools

import numpy as np
import torch

from dvae import seeds


def test_keys_are_the_same_on_every_machine_for_ever():
    assert seeds.key("order", 0, 0) == 5932176926520365375
    assert seeds.rng("order", 0, 0).random(2).tolist() == [0.9849403090657156, 0.5554953202943569]
    assert torch.rand(2, generator=seeds.generator("order", 0, 0)).tolist() == [0.32110774517059326, 0.4560415744781494]


def test_every_part_its_type_and_its_place_count():
    parts = [(), (0,), ("0",), (0, 0), (0, 1), (1, 0), ("a", 0), (0, "a"), ("a0",), (10,), (1, 0, 0)]
    keys = [seeds.key(*each) for each in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**63 for key in keys)


def test_generators_are_functions_without_memory():
    first = seeds.rng("x", 3).random(100)
    seeds.rng("y", 3).random(7)
    np.random.rand(5)
    assert np.array_equal(first, seeds.rng("x", 3).random(100))
    drawn = torch.rand(100, generator=seeds.generator("x", 3))
    torch.rand(5)
    assert torch.equal(drawn, torch.rand(100, generator=seeds.generator("x", 3)))


def test_neighbouring_keys_are_unrelated():
    rows = np.stack([seeds.rng("epoch", n).random(400) for n in range(30)])
    correlations = [np.corrcoef(rows[a], rows[b])[0, 1] for a, b in itertools.combinations(range(30), 2)]
    assert np.abs(correlations).max() < 0.25  # 5 standard deviations of 1 / sqrt(400)
    assert abs(rows.mean() - 0.5) < 0.02


def test_a_name_that_is_no_unicode_has_a_key_too():
    assert seeds.key("a\udcff") != seeds.key("a")
