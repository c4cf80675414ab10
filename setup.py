"""What setup.cfg cannot say: the wheel carries `configs/` as `unclip/configs/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install reads the clone's own `configs/`, and needs no copy."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in sorted(Path("configs").glob("*/*.yaml")):
                target = Path(self.build_lib, "unclip", source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithConfigs})
