"""What goes to the hub, and what is said: a stand-in for the hub's client records the calls."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from PIL import Image

from naruto_lora import lora
from naruto_lora.colab import preflight, share

CARD = """---
widget: [{"text": "a man", "output": {"url": "images/0.jpg"}}]
---
![both](images/compare.jpg) <img src='./own.png'> [no](previews/step-000001-0.jpg) ![no](.secret/face.jpg)
![no](checkpoint-3/x.png) ![no](link.jpg) ![no](../outside.jpg) and images/unlinked.jpg as a word
"""
GOES = ["pytorch_lora_weights.safetensors", "mine.safetensors", "README.md", "images/0.jpg", "images/compare.jpg",
        "own.png", "run.json"]


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, with all that must stay here beside it."""
    folder = tmp_path / "private home" / "mine"
    recipe = {"name": "mine", "dataset": str(tmp_path / "faces"), "base": "./models/ours", "vae": "", "rank": 4,
              "legs": [{"until": 3, "lr": 1e-4}]}
    record = {"losses": [1.0], "holdout": {"0": [[1.0]]}, "best_step": None, "seconds": 5.0, "recipe": recipe,
              "step": 3, "pictures": {"training": 1, "holdout": 0}, "device": "CPU",
              "adapter": str(folder / lora.FILE), "resumed_from": str(folder / "checkpoint-2")}
    stays = ["checkpoint-3/optimizer.safetensors", "checkpoint-3/pytorch_lora_weights.safetensors", "state.json",
             ".token", "another.safetensors", "compare.html"]
    for name in (lora.FILE, "mine.safetensors", *stays):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 20000)
    for name in ("images/0.jpg", "images/compare.jpg", "images/unlinked.jpg", "own.png", "previews/step-000001-0.jpg",
                 ".secret/face.jpg", "checkpoint-3/x.png", "../outside.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    (folder / "README.md").write_text(CARD)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Stands in for HfApi; `fails` is what it raises, `private` what a repository there is."""
    state = SimpleNamespace(calls=[], fails=None, private=None)

    class Api:
        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            state.calls.append(("create", repo_id, private, exist_ok))
            if state.fails:
                raise state.fails
            state.private = private if state.private is None else state.private
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def model_info(self, repo_id):
            return SimpleNamespace(private=state.private)

        def create_commit(self, repo_id, operations, *, commit_message):
            contents = {o.path_in_repo: o.path_or_fileobj for o in operations}
            state.calls.append(("commit", repo_id, contents))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def test_only_named_files_go_to_the_hub(run, hub, capsys):
    share.push(run, "me/style")
    create, (_, repository, sent) = hub.calls
    assert create == ("create", "me/style", True, True) and repository == "me/style"
    assert list(sent) == GOES
    assert all(sent[name] == str(run / name) for name in GOES[:-1])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "7 files go to 'me/style' on the hub, which is private:"
    assert [line.strip().split(", ")[0] for line in said[1:8]] == GOES and said[1].endswith("s, 0.02 MB")
    assert said[8].startswith("https://huggingface.co/me/style is private: to publish it, choose 'Make public' at")


def test_the_list_is_shown_before_anything_is_uploaded(run, hub, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError("the line is cut")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fails)
    with pytest.raises(ConnectionError):
        share.push(run, "me/style")
    said = capsys.readouterr().out
    assert all(f"  {name}, " in said for name in GOES) and "Make public" not in said


def test_the_record_goes_without_paths_of_this_machine(run, hub):
    share.push(run, "me/style")
    sent = json.loads(hub.calls[-1][2]["run.json"])
    assert sent["adapter"] == lora.FILE and sent["resumed_from"] == "checkpoint-2"
    assert sent["recipe"] == {"name": "mine", "dataset": "a local data set", "base": "a local base model", "vae": "",
                              "rank": 4, "legs": [{"until": 3, "lr": 1e-4}]}
    assert "private home" not in str(sent) and sent["losses"] == [1.0] and sent["device"] == "CPU"
    record = json.loads((run / "run.json").read_text())
    assert record["adapter"] == str(run / lora.FILE)  # the file here is as it was
    record["recipe"] |= {"dataset": "lambdalabs/naruto-blip-captions", "base": "stabilityai/sdxl", "vae": "me/vae"}
    (run / "run.json").write_text(json.dumps(record))
    sent = json.loads(share.shared(run)["run.json"])
    assert sent["recipe"] == record["recipe"]  # what is on the hub is named


def test_a_repository_is_public_only_if_asked_for_and_this_is_said(run, hub, capsys):
    share.push(run, "style", private=False)
    assert hub.calls[0] == ("create", "style", False, True) and hub.calls[1][1] == "me/style"
    said = capsys.readouterr().out
    assert "'me/style' on the hub, which is public:" in said and said.endswith("https://huggingface.co/me/style\n")
    share.push(run, "me/style")  # it is there and public, which `private` doesn't change
    said = capsys.readouterr().out
    assert "which is public:" in said and "private" not in said


def test_without_a_card_there_are_no_pictures_and_without_a_lora_nothing_goes(run, hub):
    (run / "README.md").unlink()
    assert list(share.shared(run)) == [*GOES[:2], "run.json"]
    (run / lora.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="there is no finished run in .*: train first"):
        share.push(run, "me/style")
    assert not hub.calls


def refusal(status, said=None):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("Client Error for url https://huggingface.co/api?token=hf_x", response=response,
                          server_message=said)


class ConnectError(Exception):
    """As httpx's: no OSError."""


@pytest.mark.parametrize("error, kind, message", [
    (ConnectError("[Errno -2] Name or service not known"), ConnectionError,
     r"'me/style' can't be uploaded to the hub \(ConnectError\): check the network and try again"),
    (OfflineModeIsEnabled("Cannot reach https://huggingface.co"), ConnectionError, r"\(OfflineModeIsEnabled\)"),
    (refusal(503), ConnectionError, r"\(HTTP 503\): check the network"),
    (refusal(403), PermissionError, "the hub refuses to write 'me/style' .*: create a token with write access"),
    (LocalTokenNotFoundError("Token is required"), PermissionError, "create a token with write access"),
    (refusal(400, "invalid license"), ValueError, r"doesn't take 'me/style' \(HTTP 400, invalid license\): change"),
    (HFValidationError("Repo id must use"), ValueError, "`push_to` can't be 'me/style': write it as your-name/my-st"),
])  # fmt: skip
def test_each_failure_is_one_sentence_with_its_fix(run, hub, error, kind, message):
    hub.fails = error
    with pytest.raises(kind, match=message) as raised:
        share.push(run, "me/style")
    assert "token=" not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.parametrize("repository, token, answer, said", [
    ("", None, None, ""),
    ("my style", "hf_x", "write", "`push_to` can't be 'my style': write it as your-name/my-style"),
    ("https://huggingface.co/me/a", "hf_x", "write", "`push_to` can't be 'https://huggingface.co/me/a': write it as"),
    ("me/a/b", "hf_x", "write", "`push_to` can't be 'me/a/b': write it as your-name/my-style"),
    ("me/mine", None, None, "there is no token: create a token with write access at https://huggingface.co/settings/"),
    ("me/mine", "hf_x", "read", "this token can only read: create a token with write access"),
    ("me/mine", "hf_x", refusal(401), "the hub doesn't know this token: create a token with write access"),
    ("me/mine", "hf_x", refusal(503), ""),
    ("me/mine", "hf_x", OfflineModeIsEnabled("offline"), ""),
    ("me/mine", "hf_x", "fineGrained", ""),
    ("mine", "hf_x", "write", ""),
])  # fmt: skip
def test_a_push_that_would_fail_is_refused_before_training(monkeypatch, repository, token, answer, said):
    def whoami(self):
        if isinstance(answer, Exception):
            raise answer
        return {"auth": {"accessToken": {"role": answer}}}

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    reason = share.refused(repository)
    assert reason.startswith(said) and bool(reason) == bool(said) and "hf_x" not in reason
    (row,) = preflight._push(repository) or [None]
    if not repository:
        assert row is None
    else:
        assert row.stops == bool(said) and row.short == reason
