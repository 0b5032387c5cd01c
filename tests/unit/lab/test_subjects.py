"""What is attacked: names, devices, and a normalisation in front."""

from dataclasses import replace

import pytest
import torch

from backpass.data import load_data
from backpass.data.normalisation import Normalisation, known_normalisation
from backpass.errors import BackpassError
from backpass.lab.subjects import load_named, load_subject, parse_device, short_names
from backpass.models import build

CPU = torch.device("cpu")


def test_a_subject_is_the_labs_network_with_its_seed_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    subject = load_subject("mlp", None, device=CPU, seed=0)
    x = torch.rand(3, 1, 8, 8)
    torch.set_rng_state(before)
    assert torch.equal(subject.model(x), build("mlp")(x))
    assert subject.size == sum(p.numel() for p in build("mlp").parameters())
    assert not subject.trained
    assert not subject.network.training
    assert load_subject("cnn", None, device=CPU).digest != subject.digest


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    load_subject("torch.nn:Identity", None, device=CPU)
    load_subject("cnn", None, device=CPU, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_normalisation_stands_in_front_of_the_network():
    subject = load_subject("mlp", None, device=CPU, normalisation=Normalisation((0.25,), (0.5,)))
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(subject.model(x), subject.network((x - 0.25) / 0.5), atol=1e-5)


def test_a_lab_network_is_made_for_its_data():
    data = load_data("digits")
    subject = load_subject("mlp:widths=8", None, device=CPU, data=data)
    (mean,), (std,) = known_normalisation("digits").mean, known_normalisation("digits").std
    own = subject.network.normalize
    assert (own.mean.item(), own.std.item()) == pytest.approx((mean, std))
    yours = replace(data, name="yours", classes=12, images=replace(data.images, pixels=data.images.pixels // 2))
    found = load_subject("mlp:widths=8", None, device=CPU, data=yours)
    assert found.model(yours.images.x[:3]).shape == (3, 12)
    assert found.network.normalize.mean.item() == pytest.approx(yours.images.x.mean().item(), abs=1e-4)


def test_a_network_that_normalises_itself_gets_no_second_normalisation():
    with pytest.raises(BackpassError, match="'mlp' normalises images itself, .*leave --normalize out"):
        load_subject("mlp", None, device=CPU, data=load_data("digits"), normalisation=Normalisation((0.5,), (0.5,)))


def test_trying_a_network_on_images_tells_what_it_does_not_take_and_keeps_its_mode():
    subject = load_subject("cnn", None, device=CPU)
    subject.network.train()
    with pytest.raises(BackpassError, match=r"'cnn' does not take the images of 'mine', of shape \(2, 3, 8, 8\)"):
        subject.try_on(torch.rand(2, 3, 8, 8), "mine")
    assert subject.network.training


def test_more_outputs_than_classes_are_told(caplog):
    subject = load_subject("cnn", None, device=CPU)
    subject.try_on(torch.rand(2, 1, 8, 8), "mine", 10)
    assert caplog.text == ""
    subject.try_on(torch.rand(2, 1, 8, 8), "mine", 4)
    assert "cnn has 10 outputs, and mine 4 classes." in caplog.text


def test_a_network_that_comes_twice_is_loaded_once():
    found = load_named(["mlp", "cnn", "mlp"], device=CPU, seed=0, normalisation=None)
    assert list(found) == ["mlp", "cnn"]
    with pytest.raises(BackpassError, match="there is no file of weights absent.pt"):
        load_named(["mlp@absent.pt"], device=CPU, seed=0, normalisation=None)


def test_files_are_named_without_folders_where_that_tells_them_apart():
    assert short_names(["m:Net@a/net.pt", "m:Net@b/other.pt", "cnn"]) == {
        "m:Net@a/net.pt": "m:Net@net.pt",
        "m:Net@b/other.pt": "m:Net@other.pt",
        "cnn": "cnn",
    }
    same = ["m:Net@a/net.pt", "m:Net@b/net.pt"]
    assert short_names(same) == dict(zip(same, same, strict=True))


def test_devices_are_read_and_refused():
    assert parse_device("cpu") == CPU
    for wrong in ("gpu", "meta", "cuda:99"):
        with pytest.raises(BackpassError, match=wrong.partition(":")[0]):
            parse_device(wrong)
