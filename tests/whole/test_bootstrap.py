"""The notebooks' set-up cell, which has to find the package before it can import it."""

import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CELL = nbformat.read(ROOT / "notebooks" / "01_setup.ipynb", 4).cells[3].source
PAGE = "https://github.com/some-one/naruto.lora/blob/main/notebooks/02_train_256.ipynb"


class Machine:
    """A Colab-like machine without naruto_lora: `content` replaces /content; commands are recorded, not run."""

    def __init__(self, content: Path):
        self.content, self.commands, self.fails, self.asked = content, [], "", 0

    def cell(self, repo: str = ""):
        exec(CELL.replace("/content", str(self.content)), {"repo": repo})

    def run(self, command, **_):
        self.commands.append(command)
        failed = self.fails and self.fails in command
        if "checkout" in command and not failed:
            (self.content / "naruto_lora" / "colab_setup.sh").parent.mkdir(exist_ok=True)
            (self.content / "naruto_lora" / "colab_setup.sh").touch()
        return subprocess.CompletedProcess(command, 128 if failed else 0, "", "fatal: no" if failed else "")

    def fetched(self):
        return [command[-2:] for command in self.commands if "fetch" in command]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "content").mkdir()
    made = Machine(tmp_path / "content")
    monkeypatch.chdir(tmp_path / "content")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", made.run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.delenv("COLAB_JUPYTER_IP", raising=False)
    return made


@pytest.fixture
def sessions(machine, monkeypatch):
    """`sessions(path, ...)` sets the kernel's session list: the pages that its notebooks were opened from."""
    monkeypatch.setenv("COLAB_JUPYTER_IP", "172.28.0.12")

    def say(*paths):
        def answer(url, timeout):
            assert url == "http://172.28.0.12:9000/api/sessions"
            return io.BytesIO(json.dumps([{"path": path} for path in paths]).encode())

        monkeypatch.setattr(urllib.request, "urlopen", answer)

    return say


def opened(page: str) -> str:
    return "fileId=" + urllib.parse.quote(page, safe="")


def test_a_checkout_above_the_notebook_is_used_as_it_is(machine, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    machine.cell()
    assert machine.commands == [] and sys.path[0] == str(ROOT)


def test_an_installed_package_is_used_as_it_is(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = list(sys.path)
    machine.cell()
    assert machine.commands == [] and sys.path == before


def test_it_is_fetched_from_the_page_that_the_notebook_was_opened_from(machine, sessions, monkeypatch):
    sessions(opened(PAGE), "/content/other.ipynb")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    machine.cell()
    assert machine.fetched() == [["https://github.com/some-one/naruto.lora", "main"]]
    there = str(machine.content / "naruto_lora")
    assert machine.commands[-1] == ["bash", f"{there}/colab_setup.sh"] and sys.path[0] == there
    machine.commands.clear()
    machine.cell()  # the second time only the check of what is missing
    assert machine.commands == [["bash", f"{there}/colab_setup.sh"]]


def test_a_branch_with_a_slash_and_a_commit(machine, sessions):
    sessions(opened(PAGE.replace("main", "some/branch")))
    machine.cell()
    assert machine.fetched()[0][1] == "some/branch"


@pytest.mark.parametrize(
    "page",
    [
        PAGE.replace("https", "http"),
        PAGE.replace("github.com", "github.com.evil.org"),
        PAGE.replace("github.com", "evil.org"),
        PAGE.replace("https://", "https://evil.org/https://"),
        PAGE.replace("https://github", "https://me:word@github"),
        PAGE.replace("some-one", "some-one;touch x"),
        PAGE.replace("/blob/main", "/blob/--upload-pack=x"),
        PAGE.replace("notebooks", "elsewhere"),
        "/content/02_train_256.ipynb",
        "1AbCdEf",  # a copy on Drive
    ],
)
def test_only_a_plain_github_page_is_accepted(machine, sessions, page):
    sessions(opened(page))
    with pytest.raises(RuntimeError, match="naruto_lora is not here: set `repo`"):
        machine.cell()
    assert machine.commands == []


def test_two_different_pages_are_refused(machine, sessions):
    sessions(opened(PAGE), opened(PAGE.replace("some-one", "another")))
    with pytest.raises(RuntimeError, match="set `repo`"):
        machine.cell()


@pytest.mark.parametrize("answer", [b"not json", b"{}", b'["x"]'])
def test_a_kernel_without_a_session_list_asks_for_the_repo(machine, sessions, monkeypatch, answer):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answer))
    with pytest.raises(RuntimeError, match="set `repo`"):
        machine.cell()

    def refuse(url, timeout):
        raise OSError("refused")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    machine.cell("https://example.org/mine.git")
    assert machine.fetched() == [["https://example.org/mine.git", "HEAD"]]


def test_the_forms_repo_comes_before_the_page(machine, sessions):
    sessions(opened(PAGE))
    machine.cell("https://example.org/mine.git")
    assert machine.fetched() == [["https://example.org/mine.git", "HEAD"]]


def test_a_failure_of_git_is_shown_and_the_next_run_tries_again(machine, capsys):
    machine.fails = "fetch"
    with pytest.raises(RuntimeError, match="fetch .* https://example.org/mine.git HEAD' failed: check `repo`, network"):
        machine.cell("https://example.org/mine.git")
    assert "fatal: no" in capsys.readouterr().out
    machine.fails = ""
    machine.cell("https://example.org/mine.git")
    assert len(machine.fetched()) == 2 and sys.path[0] == str(machine.content / "naruto_lora")


@pytest.fixture
def refusing(request):
    """A host on this machine that answers every request with the status `request.param`; yields its name and port."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(request.param)
            self.send_header("Location", "http://bob:hf_SECRET@127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "{}:{}".format(*server.server_address)
    server.shutdown()


def in_a_notebook(folder: Path, repo: str) -> str:
    """All that a kernel shows of the set-up cell, run with real git on a machine without naruto_lora."""
    code = "import importlib.util; importlib.util.find_spec = lambda name: None"
    cell = CELL.replace("/content", str(folder))
    lines = [f"get_ipython().run_cell({text!r})" for text in (code, f"repo = {repo!r}", cell)]
    program = "\n".join(["from IPython.core.interactiveshell import InteractiveShell",
                         "get_ipython = InteractiveShell.instance", *lines])  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in ("COLAB_RELEASE_TAG", "PYTHONPATH")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "HOME": str(folder), "NO_PROXY": "127.0.0.1", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    return re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)


@pytest.mark.parametrize("refusing, user", [
    (401, "bob:hf_SECRET@"), (404, "hf_SECRET@"), (302, "bob:hf_SECRET@"), (403, "bob:hf_SECRET/@"),
    (403, "bob:hf_ SECRET@"),
], indirect=["refusing"])  # fmt: skip
def test_no_failure_of_git_shows_the_token_in_the_address(refusing, tmp_path, user):
    shown = in_a_notebook(tmp_path, f"http://{user}{refusing}/me/mine.git")
    assert "SECRET" not in shown and "bob" not in shown, shown
    assert f"http://{refusing}/me/mine.git HEAD' failed: check `repo`, network and token" in shown, shown
    assert "RuntimeError" in shown and "fatal: " in shown


def test_what_git_itself_says_shows_no_token(machine, monkeypatch, capsys):
    said = "fatal: unable to access 'https://bob:hf_SECRET@example.org/'\nremote: https://hf_SECRET@example.org\n"
    monkeypatch.setattr(subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, 128, said, said))
    with pytest.raises(RuntimeError) as caught:
        machine.cell("https://bob:hf_SECRET@example.org/mine.git")
    shown = capsys.readouterr().out
    assert shown.count("unable to access 'https://example.org/'") == 2 and "SECRET" not in shown + str(caught.value)


def test_a_real_fetch_from_a_git_address(tmp_path):
    """Runs git itself, twice."""
    source, content = tmp_path / "source", tmp_path / "content"
    content.mkdir()
    for name in ("colab_setup.sh", "requirements.txt", "naruto_lora/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None\nrepo = sys.argv[1]\n"
        + CELL.replace("/content", str(content)) + "\nimport naruto_lora; print(naruto_lora.__file__)"
    )  # fmt: skip
    (tmp_path / "cell.py").write_text(code)
    command = [sys.executable, "-I", str(tmp_path / "cell.py"), str(source)]
    for _ in range(2):
        elsewhere = {key: value for key, value in os.environ.items() if key != "COLAB_RELEASE_TAG"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=content, env=elsewhere)
        assert done.stdout.strip() == str(content / "naruto_lora" / "naruto_lora" / "__init__.py"), done
