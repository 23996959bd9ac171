"""The network: shapes, causality, positions, and a loss that starts where it should."""

import math

import torch

from optstate.demo.model import HEAD, ByteGPT, rotary_table, rotate


def small() -> ByteGPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ByteGPT(width=64, depth=2, context=12)


def tokens() -> torch.Tensor:
    return torch.randint(256, (3, 13), generator=torch.Generator().manual_seed(0))


def test_logits_for_every_position() -> None:
    assert small()(tokens()[:, :7]).shape == (3, 7, 256)


def test_untrained_loss_is_that_of_a_guess() -> None:
    assert math.isclose(small().loss(tokens()).item(), math.log(256), rel_tol=0.02)


def test_a_byte_never_changes_what_came_before() -> None:
    model, before = small(), tokens()
    after = before.clone()
    after[:, 6] = (after[:, 6] + 1) % 256
    difference = (model(before[:, :12]) - model(after[:, :12])).abs().amax(dim=(0, 2))
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


def test_rotation_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, HEAD, generator=generator)
    table = rotary_table(20)
    turned_q, turned_k = (rotate(x.expand(20, HEAD), table) for x in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[3, 1], scores[13, 11])
    assert not torch.isclose(scores[3, 1], scores[3, 2])


def test_parameters_are_of_the_size_that_the_docs_say() -> None:
    model = ByteGPT(width=128, depth=3, context=64)
    assert sum(p.numel() for p in model.parameters()) == 626_304
