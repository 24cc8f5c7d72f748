"""InfoNCE against a plain implementation and the published formula; GradCache against the whole batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec.train.gradcache import RandomState, cached_backward
from minivlm2vec.train.loss import Targets, contrastive_loss, hit_rate
from tests.support.helpers import close


def targets(owner, positive=None, content=None) -> Targets:
    n = len(owner)
    return Targets(
        torch.tensor(owner),
        torch.tensor([True] * n if positive is None else positive),
        torch.tensor(range(n) if content is None else content),
    )


def vectors(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(q: Tensor, t: Tensor, about: Targets, temperature: float, *, symmetric=False, mask=False) -> Tensor:
    """Query after query, target after target, as the docstring says it; in float64."""
    q, t = F.normalize(q, dim=1), F.normalize(t, dim=1)
    owner, positive, content = about.owner.tolist(), about.positive.tolist(), about.content.tolist()
    own = [{content[n] for n in range(len(t)) if owner[n] == b and positive[n]} for b in range(len(q))]

    def one(b: int, n: int, pairs) -> Tensor:
        p = (q[b] @ t[n] / temperature).exp()
        others = sum((q[c] @ t[m] / temperature).exp() for c, m in pairs if is_negative(c, m))
        return -(p / (p + others)).log()

    def is_negative(b: int, n: int) -> bool:
        return not (owner[n] == b and positive[n]) and not (mask and content[n] in own[b])

    forth = []
    for b in range(len(q)):
        mine = [n for n in range(len(t)) if owner[n] == b and positive[n]]
        forth.append(torch.stack([one(b, n, [(b, m) for m in range(len(t))]) for n in mine]).mean())
    back = [one(owner[n], n, [(c, n) for c in range(len(q))]) for n in range(len(t)) if positive[n]]
    forth, back = torch.stack(forth).mean(), torch.stack(back).mean()
    return (forth + back) / 2 if symmetric else forth


CASES = {
    "pairs": targets([0, 1, 2, 3, 4]),
    "duplicates": targets([0, 1, 2, 3, 4], content=[7, 8, 7, 7, 9]),
    "hard negatives": targets([0, 1, 2, 3, 4, 1, 3, 3], positive=[True] * 5 + [False] * 3),
    "negatives like positives": targets([0, 1, 2, 3, 4, 1, 3], [True] * 5 + [False] * 2, [1, 2, 3, 4, 5, 4, 1]),
    "several positives": targets([0, 0, 1, 2, 2, 2, 3, 4, 0], [True] * 8 + [False], [1, 2, 3, 4, 5, 1, 6, 7, 8]),
}  # fmt: skip


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_plain_ones(case, symmetric, mask):
    about = CASES[case]
    results = []
    for f in (plain, None):
        q, t = vectors(5).requires_grad_(), vectors(len(about.owner), seed=1).requires_grad_()
        if f:
            loss = plain(q, t, about, 0.3, symmetric=symmetric, mask=mask)
        else:
            loss = contrastive_loss(q, t, about, temperature=0.3, symmetric=symmetric, mask_duplicates=mask)
        loss.backward()
        results.append((loss.detach(), q.grad, t.grad))
    for name, expected, ours in zip(("loss", "queries", "targets"), *results, strict=True):
        close(name, ours, expected, 2e-6)


def test_it_is_the_published_loss():
    """arXiv 2410.05160, equation 1, as its code has it: cross-entropy of q t^T / 0.02 to the diagonal."""
    q, t = vectors(12).float().requires_grad_(), vectors(12, seed=1).float().requires_grad_()
    scores = F.normalize(q, dim=1) @ F.normalize(t, dim=1).T / 0.02
    published = F.cross_entropy(scores, torch.arange(12))
    expected = torch.autograd.grad(published, (q, t))
    ours = contrastive_loss(q, t, targets(range(12)))
    close("loss", ours.detach(), published.detach(), 1e-5)
    for a, b in zip(torch.autograd.grad(ours, (q, t)), expected, strict=True):
        close("gradient", a, b, 1e-5)


def test_dims_average_the_losses_of_beginnings():
    q, t, about = vectors(6), vectors(6, seed=1), targets(range(6))
    each = [contrastive_loss(q[:, :d], t[:, :d], about) for d in (4, 8, 16)]
    close("dims", contrastive_loss(q, t, about, dims=(4, 8, 16)), torch.stack(each).mean(), 1e-6)


def test_masked_duplicates_are_no_negatives():
    q, t, about = vectors(2), vectors(2, seed=1), targets([0, 1], content=[5, 5])
    assert contrastive_loss(q, t, about) > 0
    assert contrastive_loss(q, t, about, mask_duplicates=True) == 0  # there is nothing else to tell apart


def test_extreme_scores_stay_finite():
    q = torch.eye(4) * 100
    loss = contrastive_loss(q, -q, targets(range(4)), temperature=1e-3)
    assert loss.isfinite() and loss > 900


def test_a_query_without_positive_and_bad_dims_are_errors():
    with pytest.raises(ValueError, match="query 1 of 2 has no positive"):
        contrastive_loss(vectors(2), vectors(2), targets([0, 0]))
    with pytest.raises(ValueError, match="vectors have 16 numbers"):
        contrastive_loss(vectors(2), vectors(2), targets([0, 1]), dims=(8, 32))


def test_hit_rate():
    q, t = torch.eye(4), torch.eye(4)[[0, 2, 1, 3]]
    assert hit_rate(q, t, targets(range(4))) == 0.5
    assert hit_rate(q, t, targets(range(4), content=[0, 1, 1, 2])) == 1.0


# --- GradCache ---------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(0.4), nn.Linear(32, 16))


def batch_loss(v: Tensor) -> Tensor:
    n = len(v) // 2
    return contrastive_loss(v[:n], v[n:], targets(range(n)), temperature=0.1)


@pytest.mark.parametrize("chunk", [1, 3, 14])
@pytest.mark.parametrize("dummies", [0, 2])
def test_gradients_equal_the_whole_batchs_with_dropout_on(chunk, dummies):
    model, x = encoder(), torch.randn(14, 10, generator=torch.Generator().manual_seed(1))
    chunks = x.split(chunk)
    torch.manual_seed(7)
    vectors = torch.cat([model(c) for c in chunks])  # one graph for all; masks are drawn chunk after chunk
    expected_loss = batch_loss(vectors)
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    torch.manual_seed(7)
    loss, cached = cached_backward(model, chunks, batch_loss, dummies=dummies)
    close("loss", loss, expected_loss.detach(), 1e-6)
    close("vectors", cached, vectors.detach(), 0)
    for p, g in zip(model.parameters(), expected, strict=True):
        close("gradient", p.grad, g, 1e-6)


def test_without_dropout_any_chunk_gives_the_one_pass_gradient():
    model, x = encoder().eval(), torch.randn(14, 10)
    expected = torch.autograd.grad(batch_loss(model(x)), list(model.parameters()))
    for chunk in (1, 3, 5, 14):
        model.zero_grad()
        cached_backward(model, x.split(chunk), batch_loss, scale=2.0)
        for p, g in zip(model.parameters(), expected, strict=True):
            close("gradient", p.grad, 2 * g, 2e-6)


def test_only_one_chunks_graph_is_alive_at_a_time():
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            ctx.count = Count()
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Count:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    model = encoder()
    cached_backward(lambda c: Counted.apply(model(c)), torch.randn(14, 10).split(2), batch_loss)
    assert alive == 0 and most == 1


def test_random_numbers_go_on_after_the_first_pass():
    model, chunks = encoder(), torch.randn(6, 10).split(2)
    torch.manual_seed(3)
    for c in chunks:
        model(c)
    expected = torch.rand(4)
    torch.manual_seed(3)
    cached_backward(model, chunks, batch_loss)
    assert torch.equal(torch.rand(4), expected)


def test_a_state_is_replayed():
    state = RandomState.now()
    first = torch.rand(3)
    with state.replayed():
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(torch.rand(3), first)


def test_parameters_of_the_loss_get_their_gradient_once():
    model, scale = encoder().eval(), nn.Parameter(torch.tensor(2.0))
    x = torch.randn(6, 10)
    (expected,) = torch.autograd.grad(scale * batch_loss(model(x)), scale)
    cached_backward(model, x.split(2), lambda v: scale * batch_loss(v), scale=4.0)
    close("scale", scale.grad, expected, 1e-6)
