"""The `minivlm2vec` command, as a user calls it."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.cli import main
from minivlm2vec.cli import new_checkpoint as new_checkpoint_command
from minivlm2vec.new_checkpoint import PRESETS
from tests.support.files_data import make_adapter
from tests.support.golden import FIXTURES, Case, synth_image, tokenizer_file
from tests.support.helpers import compiling_environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["new-checkpoint", str(path), "--seed", "3"]) == 0
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a picture ü.png"
    Image.fromarray(synth_image(50, 40, 1)).save(path)
    return path


def test_similarity_sorts_targets(folder, picture, capsys):
    targets = ["--target-text", "a dog", "--target-text", "a\ncat", "--target-image", str(picture)]
    args = ["similarity", "--model", str(folder), "--device", "cpu", "--query-text", "a cat", *targets]
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and any("a\\ncat" in line for line in lines) and any(str(picture) in line for line in lines)
    scores = [float(line.split()[0]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)

    assert main([*args, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [t["score"] for t in out["targets"]] == pytest.approx(scores, abs=1e-4)
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    image = {"text": "Represent the given image.\n", "image": picture}
    expected = e.similarity(e.encode(["a cat"]), e.encode(["a dog", "a\ncat", image]))[0]
    by_target = {t["target"]: t["score"] for t in out["targets"]}
    assert list(map(by_target.get, ["a dog", "a\ncat", str(picture)])) == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_adapter_changes_the_scores(folder, tmp_path, capsys):
    adapter = make_adapter(folder, tmp_path / "adapter")
    args = ["similarity", "--model", str(folder), "--device", "cpu", "--json", "--query-text", "a cat",
            "--target-text", "a dog"]  # fmt: skip
    e = Embedder.from_pretrained(folder, adapter=adapter, device="cpu", show_progress=False)
    scores = []
    for more in ([], ["--adapter", str(adapter)]):
        assert main([*args, *more]) == 0
        scores.append(json.loads(capsys.readouterr().out)["targets"][0]["score"])
    assert scores[1] == pytest.approx(float(e.similarity(*e.encode(["a cat", "a dog"])[:, None])[0, 0]), abs=1e-6)
    assert abs(scores[0] - scores[1]) > 1e-4


def test_similarity_on_a_photograph_gives_the_golden_number(tmp_path, capsys):
    """The golden weights by the command, a real photograph, and the score that the original's vectors have."""
    path = tmp_path / "small"
    make = ["new-checkpoint", str(path), "--preset", "small", "--seed", "1", "--tokenizer", str(tokenizer_file())]
    assert main(make) == 0
    image, text = Case("small", "c04r_image_crops4_real"), Case("small", "c01_text_short")
    capsys.readouterr()
    assert main([
        "similarity", "--model", str(path), "--device", "cpu", "--json",
        "--query-text", image.record["rows"][0]["text"],
        "--query-image", str(FIXTURES / "images/vlm2vec_example.jpg"),
        "--target-text", text.record["rows"][0]["text"],
    ]) == 0  # fmt: skip
    score = json.loads(capsys.readouterr().out)["targets"][0]["score"]
    golden = float(image.tensors["pooled"][0] @ text.tensors["pooled"][0])
    print(score, golden)
    assert score == pytest.approx(golden, abs=2e-6)


def test_info(folder, capsys):
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "decoder.layers.*.self_attn.qkv_proj.weight" in text and "16 crops" in text
    assert "one text token, of 30: 166 kFLOP" in text  # 2 * 2,330,880 + 318,976 of 30 tokens, see `text_flops`
    assert main(["info", str(folder / "config.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)
    assert report["parameters"] == sum(p.numel() for p in e.model.parameters())
    assert report["parameters"] == sum(m["parameters"] for m in report["modules"])
    assert f"{report['bytes'] / 1e6:.4g} MB" in text and "256 B" in text  # all, and a norm's 64 floats


def test_flops_of_the_published_sizes():
    """Against numbers worked out by hand: 7.25 GFLOP a token without pruning, 366 GFLOP a crop."""
    from minivlm2vec.config import VLM2VecConfig
    from minivlm2vec.info import image_flops, text_flops
    from minivlm2vec.new_checkpoint import base_config

    config = VLM2VecConfig.from_dict(base_config("full"))
    weights = 32 * (9216 * 3072 + 3072 * 3072 + 3 * 8192 * 3072)
    assert text_flops(config, 1, last_only=False) == 2 * weights + 32 * 4 * 3072
    crop = 23 * (2 * 577 * (4 * 1024**2 + 8 * 1024**2) + 4 * 577**2 * 1024) + 2 * 576 * 588 * 1024
    assert image_flops(config, (2, 2)) == 5 * crop + 2 * 757 * (4096 * 3072 + 3072**2)
    pruned, full = text_flops(config, 777), text_flops(config, 777, last_only=False)
    assert 0.025 < 1 - pruned / full < 0.035


def test_own_config(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"num_hidden_layers": 5}))
    assert main(["new-checkpoint", str(tmp_path / "m"), "--config", str(tmp_path / "c.json")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "m")]) == 0
    assert "5 x 64x128" in capsys.readouterr().out
    for text, message in (
        ('{"hidden_sise": 96}', "no key of config.json is named hidden_sise; did you mean hidden_size?"),
        ("{hidden_size: 96}", f"{tmp_path / 'c.json'} is not valid JSON"),
        ("[]", f"{tmp_path / 'c.json'} is not a JSON object but []"),
    ):
        (tmp_path / "c.json").write_text(text)
        assert main(["new-checkpoint", str(tmp_path / "other"), "--config", str(tmp_path / "c.json")]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("args, message", [
    (["similarity", "--query-text", "x"], "at least one --target"),
    (["similarity", "--target-text", "x"], "--query-text or --query-image is needed"),
    (["similarity", "--query-image", "/gone.png", "--target-text", "x"], r"/gone.png): no such file"),
    (["similarity", "--query-text", "x", "--target-text", "y", "--device", "warp"], "warp"),
])  # fmt: skip
def test_user_errors_are_one_line(folder, capsys, args, message):
    assert main([*args, "--model", str(folder)]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_folder_in_use_is_not_written_over(folder, capsys):
    before = (folder / "model.safetensors").read_bytes()
    assert main(["new-checkpoint", str(folder)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before


def test_help_and_wrong_arguments(capsys):
    for args, code in ((["--help"], 0), (["nonsense"], 2), ([], 2)):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == code


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["new-checkpoint", "--help"], ["train", "--help"]])
def test_help_comes_without_torch(arguments):
    code = (
        "import sys; from minivlm2vec.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, *arguments], env=compiling_environment(), check=True, capture_output=True
    )


def test_the_presets_that_the_command_names():
    assert set(new_checkpoint_command.PRESETS) == set(PRESETS)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_the_shell_closed(folder, closed):
    line = f'"$0" -m minivlm2vec similarity --model "$1" --device cpu --query-text a --target-text b {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
