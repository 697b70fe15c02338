from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, CLIPModel, Dinov2Model

from rlalign.evaluation.features import BATCH, features_of, read_network
from rlalign.evaluation.inception import CLASSES, FidInception
from tests.evaluation.networks import clip_folder, dinov2_folder

CPU = torch.device("cpu")


def pictures(count: int, height: int = 20, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_features_are_the_networks_own(tmp_path: Path, kind: str):
    folder = {"clip": clip_folder, "dinov2": dinov2_folder}[kind](tmp_path / kind)
    shown = pictures(3)
    found = features_of(read_network(folder, CPU), shown)
    prepared = AutoImageProcessor.from_pretrained(folder)(images=list(shown), return_tensors="pt")
    with torch.no_grad():
        if kind == "clip":
            expected = CLIPModel.from_pretrained(folder).get_image_features(**prepared).pooler_output
        else:
            expected = Dinov2Model.from_pretrained(folder)(**prepared).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected)
    assert found.std(0).min() > 0


def test_pictures_of_any_number_and_size_keep_their_order():
    def mean(batch: Tensor) -> Tensor:
        assert len(batch) <= BATCH
        return batch.float().mean((1, 2, 3))[:, None]

    shown = [*pictures(BATCH + 3), *pictures(2, 8, 8), *pictures(1)]
    expected = torch.tensor([[float(one.float().mean())] for one in shown])
    torch.testing.assert_close(features_of(mean, iter(shown)), expected)
    with pytest.raises(ValueError, match="no pictures"):
        features_of(mean, [])


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with those of the classifier that nobody asks here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = FidInception().network.state_dict()
        state |= {"fc.weight": torch.zeros(CLASSES, 2048), "fc.bias": torch.zeros(CLASSES)}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    old = {name: tensor.contiguous() for name, tensor in state.items() if "num_batches_tracked" not in name}
    save_file(old, path)  # as files of 2015 have it
    return path


def test_inception(inception: Path):
    network = read_network(inception, CPU)
    shown = pictures(2, 299, 299)
    found = features_of(network, shown)
    assert found.shape == (2, 2048) and found.isfinite().all() and (found[0] - found[1]).abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())  # pyright: ignore


def test_inception_leaves_padding_out_of_averages_and_ends_with_a_maximum(inception: Path):
    network = FidInception.read(inception).network
    ones = torch.ones(1, 192, 5, 5)
    inner = network.Mixed_5b.branch_pool(ones)
    torch.testing.assert_close(network.Mixed_5b._forward(ones)[3], inner)  # an average of ones is 1 at the rim too
    x = torch.randn(1, 2048, 4, 4, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)
    torch.testing.assert_close(network.Mixed_7c._forward(x)[3], network.Mixed_7c.branch_pool(pooled))


def test_what_is_no_network_is_said_to_be_none(tmp_path: Path, inception: Path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    for name, content in (("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, words in {
        "none.safetensors": "there is no file",
        "empty": "is no network",
        "broken": r"broken/config\.json is not JSON",
        "list": "a model of type None",
        "vit": "'vit'; it can be clip or clip_vision_model or dinov2",
        "clip": "cannot be read",
        "text.safetensors": "not a safetensors file",
        "other.safetensors": "does not hold the weights",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_network(tmp_path / name, CPU)
