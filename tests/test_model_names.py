"""Networks by name out of other packages: what a name may say, and one clear line if it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rankwise import models
from rankwise.cli import main
from rankwise.errors import OptionError
from rankwise.models.reference import Reference, parse
from rankwise.training import records


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("timm:resnet50", {}),
        ("timm:resnet50?num_classes=10", {"num_classes": 10}),
        ("timm:a?x=0.1&y=true&z=null", {"x": 0.1, "y": True, "z": None}),
        ("timm:a?depths=2,2,6&dims=[8,16]", {"depths": [2, 2, 6], "dims": [8, 16]}),
        ("transformers:clip?text_config.hidden_size=8", {"text_config.hidden_size": 8}),
        ("timm:a?act=gelu&rest=a=b", {"act": "gelu", "rest": "a=b"}),
    ],
)
def test_a_name_is_a_library_a_network_and_overrides(text, overrides):
    library, _, name = text.partition("?")[0].partition(":")
    assert parse(text) == Reference(library, name, overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tim:resnet50", "unknown library of networks 'tim'; did you mean 'timm'?"),
        ("hf-hub:owner/weights", "unknown library of networks 'hf-hub'"),
        ("timm:", "names no network; write timm:NAME"),
        ("timm:?a=1", "names no network"),
        ("timm:resnet50?depth", "'depth' is no override; write KEY=VALUE, & between"),
        ("timm:resnet50?=1", "'=1' is no override"),
        ("timm:resnet50?a=1&a=2", "a is given twice"),
        ("gtp2", "did you mean 'gpt2'?"),
        ("mlp-512x2?layers=3", "layers=3 must be a list, such as (512, 512)"),
        ("vit-cifar?drop=0.1", "vit-cifar: unknown key 'drop'; the closest are dropout"),
        ("resnet-18?classes=3", "unknown key 'classes'"),
        ("wrn-28-10?dropout", "'dropout' is no override"),
        ("lstm-char?hidden=32&hidden=64", "hidden is given twice"),
    ],
)
def test_a_malformed_name_is_refused(text, words):
    with pytest.raises(OptionError) as caught:
        models.find(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg-small?dropout=2", "vgg-small: cannot be built with {'dropout': 2}"),
        ("resnet-18?blocks=1,1", "blocks=[1, 1], inner"),
        ("resnet-18?blocks=1,1,1,0", "one whole number for every stage, from 1"),
        ("vit-cifar?heads=7", "width=512 cannot be shared out over heads=7"),
        ("lstm-char?cell=rnn", "unknown cell 'rnn'"),
    ],
)
def test_sizes_that_do_not_fit_an_own_network_are_refused(name, words):
    with pytest.raises(OptionError) as caught:
        models.build(name)
    assert words in str(caught.value)


def test_the_name_of_an_own_network_may_change_what_its_class_takes():
    same = models.build("wrn-28-10?depth=10&wide=1&dropout=0.3", input_shape=(1, 8, 8), classes=3)
    by_hand = models.WideResNet(1, depth=10, wide=1, classes=3)
    assert {n: p.shape for n, p in same.named_parameters()} == {
        n: p.shape for n, p in by_hand.named_parameters()
    }
    assert [m.p for m in same.modules() if isinstance(m, nn.Dropout)] == [0.3] * 3
    assert stored(models.build("mlp-512x2?layers=8,8")) == 785 * 8 + 9 * 8 + 9 * 10
    entry = models.find("lstm-char?hidden=32")
    usual = models.find("lstm-char")
    assert (entry.task, entry.classes, entry.input_shape, entry.description) == (
        usual.task,
        usual.classes,
        usual.input_shape,
        usual.description,
    )
    assert models.build("lstm-char").get_parameter("lstm.weight_hh_l0").shape == (1024, 256)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_own_network_tells_which_keys_its_name_takes(name):
    with pytest.raises(OptionError, match=f"^{name}: unknown key 'depht'; the closest are "):
        models.find(f"{name}?depht=1")


@pytest.mark.parametrize("library", models.LIBRARIES)
def test_a_missing_library_says_what_installs_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError) as caught:
        models.find(f"{library}:resnet50")
    assert f"{library} is not installed; pip install 'rankwise[{library}]'" in str(caught.value)


def test_a_torchvision_built_for_another_torch_is_said_and_leaves_transformers_usable(tmp_path):
    pytest.importorskip("transformers")
    for package in ("torchvision", "timm"):
        (tmp_path / package).mkdir()
    mismatch = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(mismatch)
    (tmp_path / "timm" / "__init__.py").write_text("import torchvision")
    code = (
        "from rankwise import models\n"
        "from rankwise.errors import OptionError\n"
        "print(models.find('transformers:vit').task)\n"
        "for name in ('torchvision:resnet18', 'timm:resnet18'):\n"
        "    try:\n        models.find(name)\n"
        "    except OptionError as error:\n        print(error)\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    run = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, *errors = run.stdout.splitlines()
    assert first == "classification"
    assert len(errors) == 2
    for line, library in zip(errors, ("torchvision", "timm"), strict=True):
        assert line.startswith(f"{library}:resnet18: {library} is installed but cannot be imported")
        assert "torchvision was built for another torch" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformers:gpt3", "the closest are gptj, gpt2"),
        ("transformers:llama?num_layers=3", "unknown key 'num_layers'; the closest are num_labels"),
        ("transformers:llama?hidden_size=wide", "expected int, got str (value: 'wide')"),
        ("transformers:llama?use_cache=3", "use_cache=3 must be true or false"),
        ("transformers:clip?vision_config.hiden_size=8", "vision_config.hidden_size"),
        ("transformers:gpt2?n_embd=10&n_head=3", "cannot be built"),
        ("llama-7b?hidden=3", "unknown key 'hidden'; the closest are hidden_act, hidden_size"),
    ],
)
def test_transformers_refuses_what_it_does_not_know_in_one_line(name, words, transformers):
    with pytest.raises(OptionError) as caught:
        models.build(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Sources: 304.3 M (arXiv 2010.11929: 307 M with the
# representation layer), 335-340 M (arXiv 1810.04805: 340 M), 6.738 B (arXiv 2302.13971: 6.7 B);
# GPT-2 of 124 M and 1.5 B, LLaMA of 13.0 B and 65.2 B, Mistral of 7.2 B, LLaMA 3 of 8.0 B.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit-base", 86_567_656),
        ("vit-large", 304_326_632),
        ("vit-huge", 632_045_800),
        ("bert-base", 109_514_298),
        ("bert-large", 335_174_458),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-65b", 65_285_660_672),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_published_sizes_have_their_published_parameters(name, parameters, transformers):
    with torch.device("meta"):
        model = models.build(name)
    assert stored(model) == parameters
    assert name in models.SIZES


def test_every_size_is_described_in_one_line_with_its_source():
    for size in models.SIZES.values():
        assert len(size.description) < 100
        assert "arXiv" in size.description or "2019" in size.description


def test_a_classifier_takes_the_shape_and_classes_of_the_data(transformers):
    tiny = "?hidden_size=16&num_hidden_layers=1&num_attention_heads=2&intermediate_size=16"
    name = f"transformers:vit{tiny}&patch_size=4"
    entry = models.find(name)
    assert (entry.task, entry.classes, entry.input_shape) == ("classification", 2, (3, 224, 224))
    model = models.build(name, classes=7, input_shape=(1, 8, 12))
    scores = model(torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0)))
    assert scores.shape == (2, 7)
    assert [n for n, _ in model.named_children()] == ["vit", "classifier"]  # no wrapper
    with pytest.raises(OptionError, match=r"its name says num_labels=3, but 7 is asked for"):
        models.build(f"{name}&num_labels=3", classes=7)
    with pytest.raises(OptionError, match="reads images"):
        models.build(name, input_shape=(64,))


def test_a_language_model_takes_the_vocabulary_and_length_of_the_data(transformers):
    name = "transformers:gpt2?n_embd=16&n_layer=1&n_head=2&n_positions=8"
    entry = models.find(name)
    assert (entry.task, entry.classes, entry.input_shape) == ("language modelling", 50_257, (8,))
    model = models.build(name, classes=11, input_shape=(12,))
    scores = model(torch.zeros(2, 12, dtype=torch.int64))
    assert scores.shape == (2, 12, 11)
    plain = transformers.GPT2LMHeadModel(model.config)
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(5).unsqueeze(0)
    assert_close(model.eval()(ids), plain.eval()(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("transformers:resnet", {"pixel_values": (1, 3, 224, 224)}),
        ("bert-large", {"input_ids": (1, 512)}),
        ("llama-7b", {"input_ids": (1, 2048)}),
        ("transformers:t5", {"input_ids": (1, 128), "decoder_input_ids": (1, 128)}),
        ("transformers:clip", {"input_ids": (1, 77), "pixel_values": (1, 3, 224, 224)}),
        ("transformers:whisper", {"input_features": (1, 80, 3000), "decoder_input_ids": (1, 448)}),
        ("transformers:wav2vec2", {"input_values": (1, 16_000)}),
        ("transformers:audio-spectrogram-transformer", {"input_values": (1, 1024, 128)}),
    ],
)
def test_an_example_holds_all_that_the_forward_reads(name, shapes, transformers):
    example = models.sample(name)
    assert isinstance(example, dict)
    found = {k: tuple(v.shape) for k, v in example.items() if isinstance(v, torch.Tensor)}
    assert found == shapes


def test_lists_of_a_library_are_filtered_by_a_glob(transformers):
    found = models.listed("transformers:*llama")
    assert "transformers:llama" in found
    assert all(name.endswith("llama") for name in found)
    assert "transformers:LlamaForCausalLM" in models.listed("transformers:")


def test_the_plan_of_a_network_of_billions_needs_no_storage(transformers, capsys):
    assert main(["plan", "--model", "llama-65b?num_hidden_layers=8", "--ranks", "0.25"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "56 of 58 layers low-rank; parameters 7,000,432,640 ->" in text
    assert "forward FLOPs" in text
    assert "input_ids (1, 2048)" in text


def test_a_forward_that_depends_on_values_is_planned_with_storage_if_it_is_small(
    transformers, capsys
):
    sizes = ("layers=1", "attention_heads=2", "ffn_dim=16")
    both = "&".join(f"{part}_{size}" for part in ("encoder", "decoder") for size in sizes)
    name = f"transformers:bart?d_model=16&vocab_size=40&{both}"
    assert main(["plan", "--model", name, "--ranks", "2"]) == 0
    assert "forward FLOPs" in capsys.readouterr().out


def test_a_mistake_in_a_name_is_one_line_of_the_command(capsys):
    assert main(["plan", "--model", "timn:resnet50"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean 'timm'?" in error


def test_a_network_of_another_task_is_planned_but_not_trained(transformers, capsys, tmp_path):
    assert main(["train", "--model", "bert-base", "--out", str(tmp_path)]) == 2
    assert "bert-base is a network for another task, but mnist-5k is data for classification" in (
        capsys.readouterr().err
    )


def test_a_language_model_of_transformers_trains_from_a_recipe(
    transformers, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    name = "transformers:gpt2?n_embd=16&n_layer=2&n_head=2&resid_pdrop=0.0&attn_pdrop=0.0"
    line = ["train", "--model", name, "--data", "text:fox.txt", "--context", "16"]
    line += ["--method", "factorized", "--method.ranks", "4", "--method.keep-first", "0"]
    line += ["--epochs", "1", "--lr-warmup-epochs", "0", "--batch-size", "16"]
    assert main(line) == 0
    assert "transformer.h.0.attn.c_attn" in capsys.readouterr().out
    folder = next((tmp_path / "runs").iterdir())
    assert len(folder.name) < 120
    recipe = records.recipe_of(folder)
    assert recipe is not None
    assert recipe.model == name
