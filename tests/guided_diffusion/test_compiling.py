import shutil

import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import compiling
from guided_diffusion.compiling import Compiled, check_compiler
from guided_diffusion.flags import vae_defaults
from guided_diffusion.script_util import classifier_defaults, create_classifier
from guided_diffusion.vae import create_vae
from tests.golden_values import fill
from tests.tiny_sampling import CLASSIFIER

# As torch.compile does, but for the code of the device, which costs minutes.
QUICK = {"backend": "aot_eager"}


@pytest.fixture
def graphs():
    """How many graphs have been compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_gradients_of_batches_of_any_size_and_layout_come_from_one_graph(graphs):
    flags = {**classifier_defaults(), **CLASSIFIER, "image_size": 8}
    classifier = fill(create_classifier(**flags)).eval().requires_grad_(False)
    compiled = Compiled(classifier, 4, torch.channels_last, **QUICK)
    for n, layout in ((4, torch.contiguous_format), (4, torch.channels_last), (1, None), (3, None)):
        x = torch.randn(n, 3, 8, 8, generator=torch.manual_seed(n))
        x = x if layout is None else x.contiguous(memory_format=layout)
        t = torch.arange(n)
        found, expected = (
            torch.autograd.grad(network(leaf, t).log_softmax(dim=1)[:, 7].sum(), leaf)[0]
            for network in (compiled, classifier)
            for leaf in (x.clone().requires_grad_(),)
        )
        torch.testing.assert_close(found, expected)
        assert graphs() == 1
    # More than were said: another graph, the same values.
    x, t = torch.randn(6, 3, 8, 8), torch.arange(6)
    torch.testing.assert_close(compiled(x, t), classifier(x, t))
    assert graphs() == 2


def test_a_dict_of_outputs_and_arguments_that_are_none(graphs):
    flags = {**vae_defaults(), "image_size": 8, "num_channels": 8, "prior_components": 1}
    vae = create_vae(**flags)
    compiled = Compiled(vae, 3, torch.contiguous_format, **QUICK)
    for n in (3, 2):
        x, noise = torch.rand(n, 3, 8, 8), torch.randn(n, flags["latent_dim"])
        torch.testing.assert_close(compiled(x, None, noise), vae(x, None, noise))
    assert graphs() == 1


def test_what_the_compiler_needs_is_looked_for_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    check_compiler("cpu")
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"^--compile: there is no {tmp_path}/Python.h: install"):
        check_compiler("cpu")
    monkeypatch.setenv("CXX", "none++")
    with pytest.raises(UserError, match=r"^--compile: there is no C\+\+ compiler none\+\+ on"):
        check_compiler("cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^--compile: there is no C\+\+ compiler [a-z+]+ on"):
        check_compiler("cpu")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--compile: the package triton is not installed"):
        check_compiler("cuda")
