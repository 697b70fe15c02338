"""Environments of a test's own: they see what this one has, and a package that this one has in another version."""

import subprocess
import sys
import sysconfig
from pathlib import Path

REWARDS = '''
import asyncio, ctypes, multiprocessing, os, signal, sys, time
from pathlib import Path

from palette import SHADE
from rlalign.scoring import groupwise

def shade(images, prompts):
    """What the palette of this process's environment says; 1 a picture that is white."""
    return {"score": images.float().mean((-3, -2, -1)) / 255 * SHADE, "pid": [os.getpid()] * len(images)}

class Counted:
    """Obeys prompts; writes the first pixel of every picture that it scores into a file, as its last deed."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, images, prompts):
        for prompt in prompts:
            self.obey(prompt.text)
        rows = images[:, 0, 0, 0].tolist()
        with (self.folder / "scored").open("a") as file:
            file.write("".join(f"{row}\\n" for row in rows))
        return {"score": rows, "pid": [os.getpid()] * len(rows)}

    def obey(self, order):
        if order == "raise":
            raise ValueError("this picture\\nis ugly")
        if order == "hang":
            time.sleep(3600)
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "fork and die once" and not (self.folder / "helpers").exists():
            helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
            helper.start()
            (self.folder / "helpers").write_text(str(helper.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "fork in C and die":
            if helper := ctypes.CDLL(None).fork():
                (self.folder / "helpers").write_text(str(helper))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        if order == "fill memory once" and not (self.folder / "filled").exists():
            (self.folder / "filled").touch()
            raise MemoryError
        if order == "fill memory":
            raise MemoryError
        if order == "die once" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

async def late(images, prompts):
    if prompts[0].text == "hang":
        await asyncio.sleep(3600)
    return [os.getpid()] * len(images)

@groupwise
def rank(images, prompts):
    assert len({prompt.text for prompt in prompts}) == 1
    return list(range(len(images)))

class Broken:
    def __init__(self):
        raise FileNotFoundError("no weights here")
'''


def palette(folder: Path, shade: float) -> None:
    """The package `palette`, whose versions differ in one number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "palette.py").write_text(f"SHADE = {shade}\n")


def environment(folder: Path, shade: float | None = None) -> Path:
    """A second environment, without network: this one's packages, and on top of them its own `palette`."""
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    here = sysconfig.get_path("purelib")
    (packages / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    if shade is not None:
        palette(packages, shade)
    return folder
