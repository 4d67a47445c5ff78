"""Multiply-adds, parameters and memory: formulas against what is counted, and the paper's sizes."""

import pytest
import torch
from small_models import AUTOENCODER
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.cost import (
    PEERS,
    autoencoder_cost,
    peer_decoder_cost,
    retrieval_cost,
    retrieval_formula,
    retrieval_memory,
    variations,
)
from brics_diffusers.models.presets import PRESETS


CHANGES = [
    {},
    {"key_length": 2},
    {"max_entries": 100, "grid_type": "hash"},
    {"num_levels": 3, "mlp_layers": 2},
    {"key_channels": 8, "max_resolution": 128},
    {"decoder_type": "vqgan"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_formula_equals_what_is_counted(change):
    config = AUTOENCODER | change
    counted = retrieval_cost(config)
    for part, value in retrieval_formula(config).items():
        assert counted[part]["multiply_adds"] == pytest.approx(value, rel=1e-12)


def test_without_coordinates():
    cost = autoencoder_cost(AUTOENCODER | {"use_coordinates": False})["lookup"]["multiply_adds"]
    assert cost == pytest.approx(autoencoder_cost(AUTOENCODER)["lookup"]["multiply_adds"] / 4)  # 2 corners, not 8


def test_parts_make_up_the_whole():
    cost = autoencoder_cost(AUTOENCODER)
    assert retrieval_cost(AUTOENCODER) == {part: cost[part] for part in ("lookup", "mlp")}
    autoencoder = BricsAutoencoder(**AUTOENCODER).eval()
    total = sum(part["parameters"] for part in cost.values()) * 1e6
    assert total == pytest.approx(autoencoder.num_parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder(torch.zeros(1, 3, 32, 32))  # counted on tensors with storage, where the lookup is not seen
    total = sum(part["multiply_adds"] for name, part in cost.items() if name != "lookup")
    assert total == pytest.approx(counter.get_total_flops() / 2e9)


def test_presets_have_the_size_in_the_paper():
    grids = {"ffhq-16x16x8": 21.2, "ffhq-16x16x16": 42.4, "church-32x32x4": 10.6, "church-32x32x8": 21.2}
    for name, size in (grids | {"church-64x64x4": 18.63}).items():
        assert retrieval_cost(PRESETS[name])["lookup"]["parameters"] == pytest.approx(size, abs=0.05)
    cost = autoencoder_cost(PRESETS["church-64x64x4"])
    assert cost["mlp"]["parameters"] + cost["decoder"]["parameters"] == pytest.approx(9.9, abs=0.25)
    assert 63 < cost["decoder"]["multiply_adds"] < 68  # depending on who counts
    assert cost["mlp"]["multiply_adds"] == pytest.approx(0.27, abs=0.005)  # what the paper calls retrieval


def test_style_decoder_is_the_smallest():
    ours = autoencoder_cost(PRESETS["church-64x64x4"])["decoder"]
    peers = {name: peer_decoder_cost(name) for name in PEERS}
    assert peers["VQGAN f16"]["multiply_adds"] == pytest.approx(126.8, rel=0.01)  # Table 3
    for peer in peers.values():
        assert peer["parameters"] > 4 * ours["parameters"] and peer["multiply_adds"] > 1.8 * ours["multiply_adds"]


def test_peers_at_another_size():
    small, large = (peer_decoder_cost("LDM KL-f8", size) for size in (64, 128))
    assert small["parameters"] == large["parameters"] == peer_decoder_cost("LDM KL-f8")["parameters"]
    # Convolutions grow with the pixels, attention with their square.
    assert 4 < large["multiply_adds"] / small["multiply_adds"] < 4.1
    with pytest.raises(ValueError, match="size is 24; VQGAN f16 needs a multiple of 16"):
        peer_decoder_cost("VQGAN f16", 24)


class TestMemory:
    def test_equals_what_the_graph_holds(self):
        """The same with storage: what all nodes of the graph that leads to the features have saved."""
        autoencoder = BricsAutoencoder(**AUTOENCODER, max_entries=200)  # some levels wrap
        keys = torch.rand(1, 4, 16, 16, requires_grad=True)
        features = autoencoder.grids(keys)
        nodes, todo, sizes = set(), [features.grad_fn], {}
        while todo:
            node = todo.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
            saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            for tensor in [*saved, *getattr(node, "saved_tensors", ())]:  # of torch's own nodes, and of ours
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 0:  # not the 2 of a product with 2
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        sizes.pop(autoencoder.grids.entries.data_ptr(), None)
        memory = retrieval_memory(AUTOENCODER | {"max_entries": 200}, 1)
        assert memory["lookup_saved"] == pytest.approx(sum(sizes.values()) / 1e6)

    def test_grows_with_the_batch(self):
        one, two = (retrieval_memory(AUTOENCODER, size) for size in (1, 2))
        assert two["grids"] == one["grids"] and two["features"] == 2 * one["features"]
        copy = two["features"]  # of more than one image the MLP keeps the features in another order
        assert one["activations"] < two["activations"] <= 2 * one["activations"] + copy
        parts = sum(size for name, size in two.items() if name not in ("activations", "total"))
        assert two["total"] == pytest.approx(parts) == pytest.approx(two["activations"] + 2 * two["grids"])


def test_variations_change_one_thing():
    values = {}
    for name, value, config in variations(AUTOENCODER):
        values.setdefault(name, []).append(value)
        with torch.device("meta"):
            full = BricsAutoencoder(**config).config
        found = full.key_channels // full.key_length if name == "groups" else full[name]
        assert found == value
    assert values.keys() == {"max_entries", "num_levels", "groups", "key_length"}
    assert values["key_length"] == [1, 2] and 2**12 in values["max_entries"]
