"""colab_setup.sh on simulated machines: no network, nothing installed.

Each machine is a PATH with a few real tools and a fake python3 that answers the script's calls:
`-c` (is it new enough?), `-m venv`, `-m pip` (its arguments are recorded), `-m naruto_lora.tiny.run`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
TOOLS = "bash cat cksum cp dirname grep mkdir sed tail uname".split()
NETWORK_ERROR = "WARNING: Retrying after connection broken by 'NewConnectionError(Failed to establish)'"

FAKE_PYTHON = """#!/usr/bin/env bash
here=${FAKE_HOME:?}
case "$1 ${2:-}" in
    '--version ') echo "Python ${FAKE_VERSION:-3.12.1}" ;;
    '-c '*prefix*) echo "$here/prefix" ;;
    '-c '*)
        version="(${FAKE_VERSION:-3.12.1})"
        exec "$here/real_python" -S -c "import sys; sys.version_info = ${version//./,}; $2" ;;
    '-m venv') mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    '-m pip')
        shift 2
        echo "$*" >> "$here/pip_calls"
        echo "${PIP_EXTRA_INDEX_URL:-none}" >> "$here/extra_indexes"
        case "$*" in
            *--help) echo '  -i <url>  The index (default https://registry.invalid/simple). More.' ;;
            'show torch') exit "${FAKE_NO_TORCH:-0}" ;;
            *--index-url*) exit "${FAKE_NO_CPU_INDEX:-0}" ;;
            install*) echo "${FAKE_PIP_SAYS:-}"; exit "${FAKE_PIP_FAILS:-0}" ;;
        esac ;;
    '-m '*) printf '%s|' "started in $PWD:" "$@"; echo ;;
    '- '*) exec "$here/real_python" -S "$@" ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A copy of the set-up files in a folder with spaces, and the simulated machine around it."""

    def __init__(self, home: Path):
        self.home, self.bin = home, home / "bin"
        self.root = home / "the project, cloned"
        for folder in (self.bin, self.root / "naruto_lora", home / "site", home / "prefix"):
            folder.mkdir(parents=True)
        (self.root / "naruto_lora" / "__init__.py").touch()
        for name in ("colab_setup.sh", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (home / "real_python").symlink_to(sys.executable)
        script(self.bin / "python3", FAKE_PYTHON)
        self.disk_free(50_000_000)

    def disk_free(self, kilobytes: int) -> None:
        row = f"/dev/a disk 99999999 1 {kilobytes} 90% /mnt/a disk"
        script(self.bin / "df", f"#!/usr/bin/env bash\necho 'Filesystem 1024-blocks Used'\necho '{row}'\n")

    def has(self, name: str, version: str) -> None:
        """Makes a distribution visible to the fake python3."""
        folder = self.home / "site" / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs the script from another directory."""
        env = {"PATH": str(self.bin), "FAKE_HOME": str(self.home), "PYTHONPATH": str(self.home / "site")}
        command = [self.bin / "bash", self.root / "colab_setup.sh", *arguments]
        return subprocess.run(
            command, env=env | {"TMPDIR": str(self.home)} | environment, cwd=self.home, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip

    def pip_calls(self) -> list[str]:
        calls = self.home / "pip_calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def installs(self) -> list[str]:
        return [call for call in self.pip_calls() if call.startswith("install") and "--help" not in call]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "a machine")


@pytest.fixture
def active(machine: Machine) -> Path:
    """A virtual environment that the user created."""
    folder = machine.home / "my environment"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(machine.bin / "python3", folder / "bin" / "python")
    return folder


@pytest.fixture
def colab(machine: Machine) -> Machine:
    for line in REQUIREMENTS:
        name, _, floor = line.partition(">=")
        if not line.startswith("#") and name not in ("bitsandbytes", "papermill", "nbval"):
            machine.has(name, floor)
    machine.has("torchao", "0.10.0")
    return machine


def sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done
    return done.stderr.strip().splitlines()[-1]


def test_no_argument_shows_both_commands(machine):
    done = machine.setup()
    assert done.returncode == 0
    assert "colab_setup.sh run" in done.stdout and "colab_setup.sh test" in done.stdout
    assert machine.pip_calls() == []


def test_unknown_command(machine):
    assert "there is no command 'runn'" in sentence(machine.setup("runn"))


def test_run_installs_once_and_starts_in_the_root(machine):
    first = machine.setup("run", "--fast", "a b")
    assert first.returncode == 0, first
    assert machine.installs() == ["install --no-input --editable ."]
    expected = f"started in {machine.root}:|-m|naruto_lora.tiny.run|--fast|a b|"
    assert first.stdout.splitlines()[-1] == expected
    second = machine.setup("run")
    assert second.returncode == 0 and len(machine.installs()) == 1
    with (machine.root / "requirements.txt").open("a") as file:
        file.write("another\n")
    machine.setup("run")
    assert len(machine.installs()) == 2


def test_test_installs_an_extra_and_run_needs_no_second_install(machine):
    assert machine.setup("run").returncode == 0
    done = machine.setup("test", "-k", "no such")
    side_by_side = "--numprocesses|logical|--maxprocesses|4|--dist|loadfile|--no-loadscope-reorder"
    assert done.stdout.splitlines()[-1] == f"started in {machine.root}:|-m|pytest|{side_by_side}|-k|no such|"
    assert machine.installs()[-1] == "install --no-input --editable .[test]"
    assert machine.setup("run").returncode == 0 and len(machine.installs()) == 2


def test_active_environment_is_used(machine, active):
    assert machine.setup("run", VIRTUAL_ENV=str(active)).returncode == 0
    assert (active / "naruto_lora.stamp").exists() and not (machine.root / ".venv").exists()


def test_environment_that_is_missing(machine):
    gone = machine.home / "gone"
    assert "unset VIRTUAL_ENV" in sentence(machine.setup("run", VIRTUAL_ENV=str(gone)))


def test_python_too_old(machine):
    said = sentence(machine.setup("run", FAKE_VERSION="3.8.18"))
    assert "Python 3.11 or newer is needed, but python3 is Python 3.8.18" in said
    assert machine.pip_calls() == [] and not (machine.root / ".venv").exists()


def test_newer_python_under_another_name(machine):
    script(machine.bin / "python3", "#!/usr/bin/env bash\nexit 1\n")
    script(machine.bin / "python3.13", "#!/usr/bin/env bash\necho a shim without its Python >&2\nexit 127\n")
    script(machine.bin / "python3.11", FAKE_PYTHON)
    assert machine.setup("run").returncode == 0


def test_python_cannot_make_environments(machine):
    text = FAKE_PYTHON.replace('mkdir -p "$4/bin" && cp "$0" "$4/bin/python"', "exit 1")
    script(machine.bin / "python3", text)
    assert "python3-venv" in sentence(machine.setup("run"))


def test_disk_short(machine, active):
    machine.disk_free(1_200_000)
    for environment in ({}, {"VIRTUAL_ENV": str(active)}):
        said = sentence(machine.setup("run", **environment))
        assert "about 4 GB" in said and "1200 MB" in said
    assert machine.pip_calls() == []


def test_registry_not_reached(machine):
    trouble = {"FAKE_PIP_SAYS": NETWORK_ERROR, "FAKE_PIP_FAILS": "1"}
    done = machine.setup("run", **trouble)
    said = sentence(done)
    assert "https://registry.invalid/simple can't be reached" in said and "HTTPS_PROXY" in said
    assert "NewConnectionError" not in done.stderr
    assert machine.setup("run").returncode == 0  # a failure leaves no stamp: the second try installs
    assert len(machine.installs()) == 2


@pytest.mark.parametrize(
    "says, heard",
    [("OSError: [Errno 28] No space left on device", "disk"), ("error: broken wheel", "broken wheel")],
)
def test_other_failures_of_pip(machine, says, heard):
    done = machine.setup("test", FAKE_PIP_SAYS=says, FAKE_PIP_FAILS="1")
    assert done.returncode == 1 and heard in done.stderr and "started in" not in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain torch is small")
def test_torch_for_the_cpu(machine):
    torch = next(line for line in REQUIREMENTS if line.startswith("torch>"))
    settings = {"FAKE_NO_TORCH": "1", "PIP_EXTRA_INDEX_URL": "https://mirror.invalid"}
    assert machine.setup("run", **settings).returncode == 0
    assert machine.installs()[0].endswith(f"whl/cpu {torch}") and "--no-deps" in machine.installs()[0]
    extra = set((machine.home / "extra_indexes").read_text().splitlines())
    assert extra == {"https://mirror.invalid", "https://download.pytorch.org/whl/cpu"}
    script(machine.bin / "nvidia-smi", "#!/usr/bin/env bash\n")
    machine.setup("test", FAKE_NO_TORCH="1")
    assert len(machine.installs()) == 3 and "whl/cpu" not in machine.installs()[2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain torch is small")
def test_large_torch_needs_a_larger_disk(machine):
    machine.disk_free(6_000_000)
    said = sentence(machine.setup("run", FAKE_NO_TORCH="1", FAKE_NO_CPU_INDEX="1"))
    assert "about 10 GB" in said


def test_colab_gets_only_what_it_lacks(colab):
    done = colab.setup(COLAB_RELEASE_TAG="release")
    assert done.returncode == 0, done
    calls = colab.pip_calls()
    assert len(calls) == 3 and all("--no-deps" in call for call in colab.installs())
    assert calls[0].startswith("install --no-input --no-deps bitsandbytes")
    assert calls[1] == "uninstall --yes torchao"
    assert calls[2] == "install --no-input --no-deps --editable ."
    assert "Removed torchao 0.10.0" in done.stdout and done.stdout.splitlines()[-1].endswith("ready.")


def test_colab_a_second_time(colab):
    colab.has("bitsandbytes", "0.50.2")
    shutil.rmtree(colab.home / "site" / "torchao-0.10.0.dist-info")
    colab.has("torchao", "0.16.0")
    (colab.home / "site" / "naruto_lora").symlink_to(colab.root / "naruto_lora")
    done = colab.setup(COLAB_RELEASE_TAG="release")
    assert done.returncode == 0, done
    assert colab.pip_calls() == [] and done.stdout.splitlines() == ["This Colab machine is ready."]


def test_colab_image_that_is_too_old_is_reported_and_not_changed(colab):
    shutil.rmtree(next((colab.home / "site").glob("peft-*.dist-info")))
    colab.has("peft", "0.18.9")
    colab.has("bitsandbytes", "0.50.2")
    done = colab.setup(COLAB_RELEASE_TAG="release")
    assert done.returncode == 0, done
    floor = next(line for line in REQUIREMENTS if line.startswith("peft")).partition(">=")[2]
    assert f"This image's peft 0.18.9 is older than {floor}" in done.stdout and "newest runtime version" in done.stdout
    assert not any("peft" in call for call in colab.pip_calls())


def test_colab_registry_not_reached(colab):
    trouble = {"FAKE_PIP_SAYS": NETWORK_ERROR, "FAKE_PIP_FAILS": "1"}
    assert "can't be reached" in sentence(colab.setup(COLAB_RELEASE_TAG="release", **trouble))


def test_run_on_colab_keeps_every_version(colab):
    done = colab.setup("run", COLAB_RELEASE_TAG="release")
    assert done.returncode == 0, done
    assert "--constraint" in colab.installs()[-1]
    assert not (colab.root / ".venv").exists()


def test_script_is_sound():
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    for name in ("colab_setup.sh", ".ci/run"):
        subprocess.run([*checker, ROOT / name], check=True)
