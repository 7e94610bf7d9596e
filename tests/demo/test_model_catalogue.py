"""Models that visitors can and cannot choose."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import model_catalogue
import pytest
import torch
from model_catalogue import Catalogue
from settings import Settings, read_settings
from transformers import GroupViTConfig, GroupViTModel, GroupViTTextConfig, GroupViTVisionConfig


class TestNames:
    def test_the_shipped_model_is_first_and_a_folder_of_checkpoints_offers_each(self, tiny_folder, tmp_path):
        for name in ("one", "two"):
            shutil.copytree(tiny_folder, tmp_path / name)
        (tmp_path / "notes").mkdir()
        models = Catalogue(Settings(models=(str(tmp_path), "nvidia/groupvit-gcc-yfcc")))
        assert models.names == ["pgseg-small-everyday", "one", "two", "nvidia/groupvit-gcc-yfcc"]
        assert models.load("") is models.load("pgseg-small-everyday")
        assert models.load("two").model.config.vision_config.hidden_size == 16

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["/nowhere/at/all"], "neither a folder nor a name"),
            (["a/b/c"], "neither a folder nor a name"),
            (["word"], "neither a folder nor a name"),
            (["empty"], "expected a checkpoint"),
            (["one/tiny", "other/tiny"], "two models are called tiny"),
        ],
    )
    def test_what_cannot_be_offered_is_refused_at_the_start(self, tmp_path, monkeypatch, given, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        for folder in ("one", "other"):
            (tmp_path / folder / "tiny").mkdir(parents=True)
            (tmp_path / folder / "tiny" / "config.json").touch()
        with pytest.raises(ValueError, match=message):
            Catalogue(Settings(models=tuple(given)))


class TestWhatAVisitorTypes:
    @pytest.fixture
    def no_network(self, monkeypatch):
        def refuse(*args, **kwargs):
            pytest.fail(f"asked the Hub for {args}")

        monkeypatch.setattr(model_catalogue, "_download", refuse)

    @pytest.mark.parametrize(
        "name",
        [
            *("/etc", "/etc/passwd", "../main", "demo/../../x", "./demo", "demo/..", "~/x", "a/b/c", "C:\\x"),
            *("a/b\nc", "a/"),
        ],
    )
    def test_paths_never_reach_the_hub_or_the_disk(self, name, no_network):
        with pytest.raises(ValueError, match="is not a model"):
            Catalogue(Settings()).load(name)

    def test_a_name_like_a_relative_folder_is_asked_of_the_hub(self, tiny_folder, tmp_path, monkeypatch):
        shutil.copytree(tiny_folder, tmp_path / "owner" / "model")
        monkeypatch.chdir(tmp_path)

        def offline(name, folder, max_bytes):
            raise OSError(f"no network for {name} in {folder}")

        monkeypatch.setattr(model_catalogue, "_download", offline)
        with pytest.raises(
            ValueError, match="owner/model cannot be loaded: no network for owner/model in it"
        ):
            Catalogue(Settings()).load("owner/model")

    def test_nothing_of_the_hub_where_the_owner_says_so(self, no_network):
        with pytest.raises(ValueError, match="not offered here"):
            Catalogue(Settings(any_hub_model=False)).load("owner/model")

    def test_a_model_of_the_hub_is_loaded_and_its_files_are_not_kept(self, tiny_folder, monkeypatch):
        folders = []

        def download(name, folder, max_bytes):
            folders.append(Path(folder))
            shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)

        monkeypatch.setattr(model_catalogue, "_download", download)
        models = Catalogue(Settings())
        loaded = models.load("owner/model")
        assert loaded.class_embeddings(["cat"]).shape == (1, 8)
        assert models.load("owner/model") is loaded and len(folders) == 1
        assert not folders[0].exists()

    @pytest.fixture
    def hub(self, monkeypatch):
        """A slow fake Hub, and the names requested from it."""
        asked = []

        def load(place, device, dtype):
            if not Path(place).joinpath("name").exists():
                return SimpleNamespace(model=torch.nn.Module())
            return SimpleNamespace(model=torch.nn.Module(), name=Path(place, "name").read_text())

        def download(name, folder, max_bytes):
            asked.append(name)
            time.sleep(0.2)
            Path(folder, "name").write_text(name)

        monkeypatch.setattr(model_catalogue, "load_any", load)
        monkeypatch.setattr(model_catalogue, "model_record", lambda segmenter: {})
        monkeypatch.setattr(model_catalogue, "_download", download)
        return asked

    def test_what_was_used_last_stays_and_so_does_all_that_is_offered(self, hub, tiny_folder, tmp_path):
        for number in range(5):
            shutil.copytree(tiny_folder, tmp_path / f"own{number}")
        models = Catalogue(Settings(models=(str(tmp_path),)))
        own = {name: models.load(name) for name in models.names}
        for name in ("a/1", "a/2", "a/3", "a/1", "a/4"):
            models.load(name)
        assert all(models.load(name) is found for name, found in own.items())
        assert hub == ["a/1", "a/2", "a/3", "a/4"]
        models.load("a/1")
        assert len(hub) == 4
        models.load("a/2")
        assert len(hub) == 5

    def test_nobody_waits_for_anothers_download_and_nothing_is_loaded_twice(self, hub, monkeypatch):
        models = Catalogue(Settings())
        arrived = threading.Barrier(2, timeout=30)

        def download(name, folder, max_bytes):
            hub.append(name)
            arrived.wait()  # only passes if both are loaded at the same time
            Path(folder, "name").write_text(name)

        monkeypatch.setattr(model_catalogue, "_download", download)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(models.load, ["a/1", "a/1", "a/2", "a/2"]))
        assert sorted(hub) == ["a/1", "a/2"]
        assert [each.name for each in found] == ["a/1", "a/1", "a/2", "a/2"]
        assert found[0] is found[1] and found[2] is found[3]
        assert not models._loading

    def test_the_hub_is_asked_without_a_token_for_weights_of_a_fair_size(self, tmp_path, monkeypatch):
        asked = []

        files = {"config.json": 10, "model.safetensors": 500, "pytorch_model.bin": 10**12, "modeling.py": 5}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]

        class Api:
            def __init__(self, token):
                assert token is False

            def model_info(self, name, files_metadata, timeout):
                return SimpleNamespace(siblings=siblings)

        monkeypatch.setattr(model_catalogue, "HfApi", Api)
        monkeypatch.setattr(model_catalogue, "snapshot_download", lambda name, **kwargs: asked.append(kwargs))
        model_catalogue._download("owner/model", str(tmp_path), 510)
        wanted = ["model.safetensors", "config.json"]
        assert asked == [{"local_dir": str(tmp_path), "allow_patterns": wanted, "token": False}]
        with pytest.raises(ValueError, match="510 bytes, more than the 509"):
            model_catalogue._download("owner/model", str(tmp_path), 509)

    def test_errors_do_not_tell_where_files_lie(self, tiny_folder, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(tiny_folder, broken)
        (broken / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(ValueError, match="broken cannot be loaded") as caught:
            Catalogue(Settings(models=(str(broken),))).load("broken")
        assert str(tmp_path) not in str(caught.value)


def test_a_groupvit_checkpoint_gives_its_own_numbers(tmp_path):
    text = {"vocab_size": 49_408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "depths": [1, 1, 1], "num_hidden_layers": 3},
        **{"num_group_tokens": [6, 4, 0], "num_output_groups": [6, 4, 0], "image_size": 32, "patch_size": 8},
    }
    heads = {"num_attention_heads": 2}
    torch.manual_seed(0)
    source = GroupViTModel(
        GroupViTConfig(
            text_config=GroupViTTextConfig(**text, **heads).to_dict(),
            vision_config=GroupViTVisionConfig(**vision, **heads).to_dict(),
            projection_dim=8,
            projection_intermediate_dim=16,
        )
    ).eval()
    source.save_pretrained(tmp_path / "groupvit")
    segmenter = Catalogue(Settings(models=(str(tmp_path / "groupvit"),))).load("groupvit")
    assert segmenter.model.config.npr_variant == "none"
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = source.get_image_features(pixels).pooler_output
        torch.testing.assert_close(segmenter.model.get_image_features(pixels).pooler_output, expected)


class TestSettings:
    def test_variables_are_the_defaults_of_options(self, monkeypatch):
        monkeypatch.setenv("PGSEG_DEMO_MODELS", "a/b:/models")
        monkeypatch.setenv("PGSEG_DEMO_ANY_HUB_MODEL", "false")
        monkeypatch.setenv("PGSEG_DEMO_MCP", "1")
        settings = read_settings(["--concurrency", "3"])
        assert settings.models == ("a/b", "/models") and settings.mcp and not settings.any_hub_model
        assert settings.concurrency == 3
        assert read_settings(["--models", "c/d", "--no-mcp"]).models == ("c/d",)
        assert settings.max_seconds == 60 and not settings.web_images
        monkeypatch.setenv("PGSEG_DEMO_WEB_IMAGES", "yes")
        monkeypatch.setenv("PGSEG_DEMO_MAX_SECONDS", "5")
        assert read_settings([]).max_seconds == 5 and read_settings([]).web_images

    def test_no_requests_at_once_make_no_sense(self):
        with pytest.raises(SystemExit):
            read_settings(["--concurrency", "0"])
