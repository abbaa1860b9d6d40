"""Downloads, from a stand-in for the hub on this machine that serves the hub's file layout."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from naruto_lora import hub, recipe, tiny

ROOT = Path(__file__).parents[1]
COMMIT = "0" * 39 + "1"
BASE, VAE, DATA = recipe.Recipe.base, recipe.Recipe.vae, recipe.Recipe.dataset


class Hub(BaseHTTPRequestHandler):
    """Serves `repositories`, {"models/owner/name": folder}; refuses `gated` names, never sends `stalled` files."""

    repositories, gated, stalled, asked = {}, set(), set(), []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        if path.startswith("api/"):
            name = "/".join(path.split("/")[1:4])
            return self._about(name, "tree" in path) if name in self.repositories else self._refuse(404, "RepoNotFound")
        kind = "" if path.startswith("datasets/") else "models/"
        name, _, rest = (kind + path).partition("/resolve/")
        if name not in self.repositories:
            return self._refuse(404, "RepoNotFound")
        if name in self.gated:
            return self._refuse(403, "GatedRepo")
        file = self.repositories[name] / rest.partition("/")[2]
        return self._file(file) if file.is_file() else self._refuse(404, "EntryNotFound")

    def _about(self, name, tree):
        folder = self.repositories[name]
        found = [(f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*") if f.is_file()]
        siblings = [{"rfilename": path, "size": size} for path, size in found]
        listed = [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in found]
        about = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": [],
                 "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self._send(200, json.dumps(listed if tree else about).encode(), {"Content-Type": "application/json"})

    def _file(self, file):
        content, start = file.read_bytes(), 0
        if found := self.headers.get("Range"):
            start = int(found.split("=")[1].split("-")[0])
        headers = {"ETag": f'"{hash(content) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if file.name in self.stalled and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.flush()
            return self.server.released.wait(60)
        self._send(206 if start else 200, content[start:], headers)

    def _refuse(self, status, code):
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, pictures):
    """SDXL's repositories with the embedded base's content, beside files that are not needed; yields the server."""
    root = tmp_path / "hub"
    base = Path(shutil.copytree(tiny.BASE, root / "base"))
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        for file in (base / part).glob("*.safetensors"):
            shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    (base / "sd_xl_base_1.0.safetensors").write_bytes(bytes(1000))
    (base / "unet" / "openvino_model.bin").write_bytes(bytes(1000))
    vae = Path(shutil.copytree(tiny.BASE / "vae", root / "vae"))
    data = root / "data"
    parquet(pictures, data / "data")
    handler = type("Handler", (Hub,), {"gated": set(), "stalled": set(), "asked": []})
    handler.repositories = {f"models/{BASE}": base, f"models/{VAE}": vae, f"datasets/{DATA}": data}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.released, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()


def parquet(pictures: Path, folder: Path) -> None:
    """The pictures as the hub's data set has them: columns image and text."""
    import pyarrow
    from pyarrow import parquet as files

    from naruto_lora import data

    rows = [{"image": {"bytes": e.read(), "path": None}, "text": e.caption} for e in data.load(pictures)]
    folder.mkdir(parents=True)
    files.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def run(served, home: Path, code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new process that uses the stand-in as its hub."""
    host, port = served.server_address
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": f"http://{host}:{port}", "HF_HOME": str(home), "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = "from naruto_lora import data, hub, recipe, train\nfrom naruto_lora.recipe import Leg\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=home.parent)


def test_only_the_needed_files_are_downloaded():
    listing = dict.fromkeys(
        ("model_index.json", "sd_xl_base_1.0.safetensors", "unet/config.json", "unet/openvino_model.bin",
         "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
         "vae/diffusion_pytorch_model.fp16.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
         "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack", "README.md"), 1)  # fmt: skip
    half = hub._base_files(listing, recipe.load("naruto-1024"))
    assert set(half) == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors",
                         "tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/model.fp16.safetensors"}
    own = hub._base_files(listing, recipe.load("naruto-1024", vae="", precision="fp32"))
    assert "unet/diffusion_pytorch_model.safetensors" in own and not any(".fp16." in name for name in own)
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in hub._base_files(listing, recipe.load("naruto-256", vae=""))


@pytest.mark.slow
def test_the_default_models_and_data_come_from_the_hub_and_train(served, tmp_path):
    code = """
import pathlib
plan = recipe.load("naruto-256", legs=(Leg(2, 1e-3),), resolution=64, batch=2, accumulation=1, precision="fp32",
                   holdout=0.1, previews=0)
print([(d.repository, d.size > 0) for d in hub.missing(plan)])
hub.fetch(plan)
print(hub.missing(plan), len(data.load(plan.dataset)))
train.train(plan, "run", show=type("Quiet", (), {"__call__": lambda *a, **k: None, "note": lambda *a: None})())
print(pathlib.Path("run/pytorch_lora_weights.safetensors").is_file())
"""
    done = run(served, tmp_path / "home", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [str([(BASE, True), (VAE, True), (DATA, True)]), "[] 24", "True"]
    files = {path.split("/resolve/")[1].split("/", 1)[1] for path in served.RequestHandlerClass.asked
             if "/resolve/" in path}
    assert "sd_xl_base_1.0.safetensors" not in files and "unet/openvino_model.bin" not in files
    assert not any(".fp16." in name for name in files) and "unet/diffusion_pytorch_model.safetensors" in files


@pytest.mark.slow
def test_a_stalled_download_is_tried_again_without_xet_then_reported(served, tmp_path):
    served.RequestHandlerClass.stalled.add("diffusion_pytorch_model.safetensors")
    code = f"""
hub.STALL, real, tries = 6, hub._run_watched, []
hub._run_watched = lambda d, show, env: tries.append(env.get("HF_HUB_DISABLE_XET")) or real(d, show, env)
plan = recipe.load("naruto-256", base="{tiny.BASE}", dataset="/tmp", precision="fp32")
try:
    hub.fetch(plan)
except TimeoutError as error:
    print(error, tries)
"""
    done = run(served, tmp_path / "home", code)
    assert f"the download of {VAE} has stalled" in done.stdout, done
    assert f"the download of '{VAE}' stalls: check the network" in done.stdout and "[None, '1']" in done.stdout


@pytest.mark.slow
def test_what_is_gated_or_missing_is_explained(served, tmp_path):
    served.RequestHandlerClass.gated.add(f"models/{VAE}")
    code = f"""
for changes in ({{"base": "{tiny.BASE}"}}, {{"base": "nobody/nothing"}}):
    try:
        hub.fetch(recipe.load("naruto-256", dataset="/tmp", precision="fp32", **changes))
    except FileNotFoundError as error:
        print(error)
"""
    done = run(served, tmp_path / "home", code)
    first, second = done.stdout.splitlines() or [done.stderr, ""]
    assert f"the model '{VAE}' is gated: accept its terms at https://huggingface.co/{VAE}" in first
    assert "the model 'nobody/nothing' is neither a folder here nor on the hub" in second


@pytest.mark.slow
def test_a_lora_of_any_name_comes_from_the_hub(served, tmp_path):
    """diffusers' file, peft's with its settings, or the only one; several are named, a README alone is no LoRA."""
    contents = {"me/diffusers": [hub.LORA, "other.safetensors"], "me/peft": [*hub.PEFT, "more.safetensors"],
                "me/pixel-art": ["pixel-art-xl.safetensors", "README.md"], "me/two": ["a.safetensors", "b.safetensors"],
                "me/none": ["README.md"]}  # fmt: skip
    for name, files in contents.items():
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_bytes(file.encode())
        served.RequestHandlerClass.repositories[f"models/{name}"] = folder
    code = f"""
for name in {list(contents)}:
    try:
        file = hub.adapter(name)
        print(file.name, file.read_text(), sorted(f.name for f in file.parent.iterdir()))
    except FileNotFoundError as error:
        print(error)
"""
    done = run(served, tmp_path / "home", code)
    lora, peft, mend = hub.LORA, hub.PEFT, "choose another, or download one and name it"
    assert done.stdout.splitlines() == [
        f"{lora} {lora} {[lora]}",
        f"{peft[0]} {peft[0]} {sorted(peft)}",
        "pixel-art-xl.safetensors pixel-art-xl.safetensors ['pixel-art-xl.safetensors']",
        f"'me/two' on the hub has several .safetensors files (a.safetensors, b.safetensors): {mend}",
        f"'me/none' on the hub has no .safetensors file: {mend}",
    ], done.stderr[-2000:]
