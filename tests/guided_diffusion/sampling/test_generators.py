"""Images that a function makes: the same by index whatever is asked for, and errors in one line."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import RandomStreams, derived_seed, random_labels
from guided_diffusion.sampling.generators import GeneratedImages, generator_of, load_generator
from guided_diffusion.sampling.sources import contents_of, open_generator
from guided_diffusion.sampling.trial import Spread
from guided_diffusion.settings.record import StartSettings

CPU = torch.device("cpu")
MODULE = """
import torch

class Linear(torch.nn.Module):
    latent_shape, num_classes = (4, 2), 5

    def __init__(self, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(864.0).view(8, -1).sin() / 4)
        self.to(device)

    def forward(self, latents, labels):
        pixels = latents.flatten(1) @ self.weight + labels[:, None] / 5
        return pixels.view(-1, 3, 6, 6).tanh()

def uneven(device):
    def generate(latents):
        # Depends on the rows beside it and on torch's own numbers.
        return (latents.mean() + latents.view(-1, 3, 8, 8) + torch.randn(3, 8, 8)).tanh()
    generate.latent_shape, generate.batch_size = [192], 4
    return generate
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "my_gan.py"
    path.write_text(MODULE)
    return path


def test_images_of_latents_and_labels_of_the_samples_own_streams(module):
    generator = load_generator(f"{module}:Linear", CPU)
    images = GeneratedImages(generator, 40, 7)
    latents = RandomStreams(7, 18, 22, "latents").randn(torch.empty(4, 4, 2))
    labels = random_labels(7, 18, 22, 5)
    with torch.inference_mode():
        expected = to_uint8(generator.function(latents, torch.from_numpy(labels)))
    assert images.shape == (40, 6, 6, 3) and images.has_labels
    assert np.abs(images.read(18, 22).astype(int) - expected.astype(int)).max() <= 1
    np.testing.assert_array_equal(images.labels(18, 22), labels)


@pytest.mark.parametrize("name", ["Linear", "uneven"])
def test_an_image_is_the_same_whatever_is_read_beside_it(module, name):
    generator = load_generator(f"{module}:{name}", CPU)
    whole = GeneratedImages(generator, 37, 1).read(0, 37)
    torch.manual_seed(3)
    for start, stop in ((0, 37), (5, 6), (3, 20), (36, 37)):
        read = GeneratedImages(generator, stop, 1).read(start, stop)
        np.testing.assert_array_equal(read, whole[start:stop])
    assert (GeneratedImages(generator, 37, 2).read(0, 37) != whole).any(axis=(1, 2, 3)).all()
    assert len(np.unique(whole.reshape(37, -1), axis=0)) == 37


def test_the_first_block_is_made_once_for_a_seed(module):
    generator = load_generator(f"{module}:Linear", CPU)
    blocks = []
    count = generator.function.register_forward_pre_hook(lambda *_: blocks.append(1))
    for seed in (11, 12, 11):
        open_generator(f"{module}:Linear", 16, seed, CPU).start(0, 16)
    assert len(blocks) == 2
    start = StartSettings("generator", f"{module}:Linear", None, 16)
    assert contents_of(start) == generator.contents
    assert len(blocks) == 2
    count.remove()


def test_torch_goes_on_with_its_own_numbers(module):
    generator = load_generator(f"{module}:uneven", CPU)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    generator.images(0, 1)
    assert torch.equal(torch.randn(3), expected)


def contents(text: str, path) -> str:
    path.write_text(text)
    load_generator.cache_clear()
    return load_generator(f"{path}:Linear", CPU).contents


def test_contents_tell_code_tensors_and_version_apart(module, tmp_path):
    same = tmp_path / "elsewhere" / "my_gan.py"
    same.parent.mkdir()
    first = contents(MODULE, module)
    assert contents(MODULE, same) == first
    assert contents(MODULE.replace("labels[:, None] / 5", "labels[:, None] / 6"), module) != first
    linear = load_generator(f"{same}:Linear", CPU).function
    of_tensors = generator_of(linear, CPU, "images").contents
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert generator_of(linear, CPU, "images").contents != of_tensors
    linear.weight.data[0, 0] -= 1
    assert generator_of(linear, CPU, "images").contents == of_tensors
    linear.version = "2"
    assert generator_of(linear, CPU, "images").contents != of_tensors


NETWORK = None


def named_globally(network):
    global NETWORK
    NETWORK = network
    return lambda latents: NETWORK(latents)


def in_a_closure(network):
    @torch.no_grad()
    def generate(latents):
        return network(latents)

    return generate


class Holder:
    def __init__(self, network):
        self.networks = [network]

    def __call__(self, latents):
        return self.networks[0](latents)

    def generate(self, latents):
        return self(latents)


def in_a_lambda_of_an_object(network):
    holder = Holder(network)
    return lambda latents: holder(latents)


def in_a_partial(network):
    return functools.partial(lambda net, latents: net(latents), network)


def named_in_a_comprehension(network):
    global NETWORK
    NETWORK = network
    return lambda latents: torch.stack([NETWORK(one) for one in latents])


def beside_an_empty_cell(network):
    def generate(latents):
        return network(latents) if latents.device.type == "cpu" else scaler(network(latents))

    if network is None:
        scaler = abs
    return generate


def of_a_class(network):
    class Generate:
        net = network

        def __call__(self, latents):
            return self.net(latents)

    return Generate()


def named_where_it_is_called(network):
    class Generate:
        def __call__(self, latents):
            return network(latents)

    return Generate()


class InASlot:
    __slots__ = ("latent_shape", "network")

    def __init__(self, network):
        self.network = network

    def __call__(self, latents):
        return self.network(latents)


@pytest.mark.parametrize(
    "make",
    [
        *(named_globally, in_a_closure, Holder, in_a_lambda_of_an_object, in_a_partial),
        *(named_in_a_comprehension, beside_an_empty_cell, of_a_class, named_where_it_is_called),
        InASlot,
    ],
)
def test_contents_tell_the_weights_apart_that_a_function_holds(make):
    def contents_with(bias: float) -> str:
        network = torch.nn.Linear(2, 3)
        torch.nn.init.ones_(network.weight)
        torch.nn.init.constant_(network.bias, bias)
        function = make(network)
        function.latent_shape = (2,)
        return generator_of(function, CPU, "images").contents

    first = contents_with(1.0)
    assert contents_with(1.0) == first
    assert contents_with(2.0) != first


def test_a_saved_network_makes_the_same_images(tmp_path):
    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3 * 8 * 8)

        def forward(self, latents, labels):
            return (self.layer(latents) + labels[:, None]).view(-1, 3, 8, 8).tanh()

    decoder = Decoder().eval()
    about = {"latent_shape": [4], "num_classes": 3, "batch_size": 8}
    given = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)
    extra = {"generator.json": json.dumps(about)}
    torch.jit.save(torch.jit.trace(decoder, given), tmp_path / "a.pt", _extra_files=extra)
    program = torch.export.export(decoder, given)
    torch.export.save(program, tmp_path / "a.pt2", extra_files=extra)
    vars(decoder).update(about)
    expected = GeneratedImages(generator_of(decoder, CPU, "images"), 20, 0)
    for name in ("a.pt", "a.pt2"):
        source = open_generator(str(tmp_path / name), 20, 0, CPU)
        found = ((source.start(0, 20).images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected.read(0, 20)).max() <= 1
        np.testing.assert_array_equal(source.start(3, 20).labels, expected.labels(3, 20))
    torch.export.save(program, tmp_path / "b.pt2")
    with pytest.raises(UserError, match=r"--generator .*b\.pt2: the generator needs an attribute"):
        load_generator(str(tmp_path / "b.pt2"), CPU)


def test_a_trial_takes_the_first_images(module):
    source = open_generator(f"{module}:Linear", 5000, 0, CPU)
    few = open_generator(f"{module}:Linear", 20, 0, CPU)
    assert torch.equal(Spread(source, 20).start(0, 20).images, few.start(0, 20).images)


BAD = {
    "return None": r"what the factory gave, None, cannot be called",
    "return lambda z: z": r"needs an attribute latent_shape, such as \(512,\)",
    "g.latent_shape = (0,); return g": r"latent_shape.* whole numbers from 1, not \(0,\)",
    "g.num_classes = 2.5; return g": r"num_classes must be a whole number from 1, not 2\.5",
    "g.batch_size = 0; return g": r"batch_size must be a whole number from 1, not 0",
    "g.out = None; return g": r"what it gave is a NoneType, it must be a tensor",
    "g.out = torch.zeros(16, 8, 8, 3); return g": r"float32\[16, 8, 8, 3\], it must be float \[16,",
    "g.out = torch.zeros(8, 3, 8, 8); return g": r"float32\[8, 3, 8, 8\], it must be float \[16, 3",
    "g.out = torch.zeros(16, 3, 8, 8, dtype=torch.int64); return g": r"int64\[16, 3, 8, 8\]",
    "g.out = torch.zeros(16, 8, 8, 1, dtype=torch.uint8); return g": r"uint8\[16, 8, 8, 1\]",
    "g.out = torch.full((16, 3, 8, 8), torch.nan); return g": r"NaN or infinite in image 0",
    "g.out = torch.full((16, 3, 8, 8), 255.0); return g": r"values of 255, they must be in \[-1",
    "raise KeyError('weights')": r"KeyError: 'weights' \(.*bad\.py:7\)",
    "torch.load('no_such_file')": r"FileNotFoundError: .*no_such_file.*\(.*bad\.py:7\)",
    "g.out = property; del g.out; return g": r"AttributeError: .*out.*\(.*bad\.py:4\)",
}


@pytest.mark.parametrize("line", BAD)
def test_what_goes_wrong_is_one_line(tmp_path, line):
    path = tmp_path / "bad.py"
    path.write_text(
        "import torch\ndef load(device):\n    def g(z):\n        return g.out\n"
        f"    g.latent_shape = (4,)\n    g.out = torch.zeros(16, 3, 8, 8)\n    {line}\n"
    )
    with pytest.raises(UserError, match=f"^--generator .*bad.py:load: .*{BAD[line]}") as caught:
        open_generator(f"{path}:load", 4, 0, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_gan", "--generator: 'my_gan' is not MODULE:FUNCTION"),
        ("no_such_module_here:f", "--generator: cannot import no_such_module_here"),
        ("missing.py:f", "--generator: there is no file missing.py"),
        ("missing.pt", "--generator: there is no file missing.pt"),
    ],
)
def test_targets_that_are_none(target, message):
    with pytest.raises(UserError, match=message):
        load_generator(target, CPU)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_pipeline_of_diffusers(tmp_path, classes):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, num_class_embeds=classes,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), in_channels=3,
        out_channels=3,
    )  # fmt: skip
    scheduler = diffusers.CMStochasticIterativeScheduler()
    pipeline = diffusers.ConsistencyModelPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path / "one_step")
    generator = load_generator(str(tmp_path / "one_step"), CPU)
    images = GeneratedImages(generator, 20, 1)
    assert images.shape == (20, 8, 8, 3) and images.has_labels == bool(classes)

    torch.manual_seed(derived_seed(1, 1))
    labels = torch.from_numpy(random_labels(1, 16, 32, classes)) if classes else None
    expected = pipeline(batch_size=16, class_labels=labels, output_type="np").images
    expected = (expected * 255).astype(int)
    assert np.abs(images.read(16, 20).astype(int) - expected[:4]).max() <= 1
    np.testing.assert_array_equal(images.read(17, 18)[0], images.read(16, 20)[1])

    shutil.copytree(tmp_path / "one_step", tmp_path / "copy")
    assert load_generator(str(tmp_path / "copy"), CPU).contents == generator.contents
    with torch.no_grad():
        unet.conv_out.bias += 1
    pipeline.save_pretrained(tmp_path / "other")
    assert load_generator(str(tmp_path / "other"), CPU).contents != generator.contents
    pipeline.scheduler.register_to_config(sigma_max=40.0)
    pipeline.save_pretrained(tmp_path / "steps")
    others = {load_generator(str(tmp_path / name), CPU).contents for name in ("other", "steps")}
    assert len(others) == 2


def test_folders_that_are_no_pipeline_for_start_images(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with pytest.raises(UserError, match=r"--generator: .* has no model_index.json"):
        load_generator(str(tmp_path), CPU)
    with pytest.raises(UserError, match="--generator: hf://x is not of the form"):
        load_generator("hf://x", CPU)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    scheduler = diffusers.RePaintScheduler()
    diffusers.RePaintPipeline(unet, scheduler).save_pretrained(tmp_path / "repaint")
    with pytest.raises(UserError, match="a RePaintPipeline needs more than a number of images"):
        load_generator(str(tmp_path / "repaint"), CPU)
