"""The source model as a graph: the same numbers, or none at all; and threads that leave nothing behind."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.base import Norm, Output, Segments
from tests.serving import TinyNetwork, tiny_network
from tta_server.engine.forward import StreamwiseNetwork, plain_rows
from tta_server.engine.norm import Pass
from tta_server.engine.source import load_model
from tta_server.engine.threads import in_passing
from tta_server.engine.traced import SIZES
from tta_server.settings import InputSettings, load_settings

SPEC = InputSettings(shape=(3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
DEMO = Path(__file__).parents[2] / "tta_server" / "demo" / "config.yaml"


def compiled(network: nn.Module) -> StreamwiseNetwork:
    made = StreamwiseNetwork(network, SPEC, "head", torch.device("cpu"))
    made.compile_source(SPEC)
    return made


def run(network: StreamwiseNetwork, x: Tensor, **how: object) -> Output:
    with torch.no_grad():
        return network.run(Pass(Segments([len(x)]), **how), x)  # type: ignore[arg-type]  # a field of it


class Branching(TinyNetwork):
    """Does something else where an input is bright: a graph would not."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return -scores if bool(x.mean() > 1.0) else scores


class Counting(TinyNetwork):
    """Does something else for large batches."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return scores * 2 if len(x) > 40 else scores


def test_the_demo_model_is_a_graph() -> None:
    model = load_model("digits", load_settings(DEMO), torch.device("cpu"))
    assert model.network._graph is not None


def test_a_graph_scores_as_the_network_does() -> None:
    network = compiled(tiny_network())
    assert network._graph is not None
    x = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    with torch.no_grad():
        expected = tiny_network()((x - mean) / std)
    output = run(network, x)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, output.features @ tiny_network().head.weight.T + tiny_network().head.bias)  # type: ignore[operator, union-attr]  # its head
    assert output.statistics == {}
    assert not output.logits.requires_grad


@pytest.mark.parametrize("size", [*SIZES, 100, 129])
def test_rows_are_the_same_bit_for_bit_in_any_company(size: int) -> None:
    network, x = compiled(tiny_network()), torch.rand(130, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = run(network, x)
    for start in (0, 130 - size):
        part = run(network, x[start : start + size])
        assert torch.equal(part.logits, whole.logits[start : start + size])
        assert torch.equal(part.features, whole.features[start : start + size])


def test_only_plain_passes_are_the_graphs() -> None:
    """Streams with weights of their own, other statistics and passes that are watched run layer by layer."""
    network, x = compiled(tiny_network()), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    plain = run(network, x).logits
    network._graph = None
    assert torch.allclose(run(network, x).logits, plain, atol=1e-6)
    network = compiled(tiny_network())
    doubled = {"bn1.weight": 2 * torch.ones(1, 6)}
    assert not torch.allclose(run(network, x, weights=doubled).logits, plain)
    assert not torch.allclose(run(network, x, norm=Norm(1.0)).logits, plain)
    observed: list[tuple[str, Tensor, Tensor]] = []
    run(network, x, observe=True, observed=observed)
    assert [name for name, _, _ in observed] == ["bn1", "bn2"]


@pytest.mark.parametrize(
    ("network", "reason"), [(Branching, "tracing warned"), (Counting, "tracing warned|otherwise than the network")]
)
def test_a_network_that_a_graph_would_not_be_runs_itself(
    network: type[TinyNetwork], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = compiled(network().eval())
    assert made._graph is None
    assert any(part in caplog.text for part in reason.split("|"))
    x = torch.full((64, 3, 8, 8), 0.99) + plain_rows(made, SPEC, 64) / 100
    assert torch.equal(run(made, x).logits, made._layer_by_layer(Pass(Segments([64])), x).logits)


def test_double_precision_runs_layer_by_layer() -> None:
    assert compiled(tiny_network().double())._graph is None


def test_a_passing_thread_gives_its_result_or_error_and_ends() -> None:
    seen: list[threading.Thread] = []

    def work() -> int:
        seen.append(threading.current_thread())
        return 7

    assert in_passing(work) == 7
    assert seen[0] is not threading.current_thread()
    assert not seen[0].is_alive()
    with pytest.raises(ZeroDivisionError):
        in_passing(lambda: 1 // 0)
