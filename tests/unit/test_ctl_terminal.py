# SPDX-License-Identifier: Apache-2.0
"""Text on a terminal: control characters of others are shown, not obeyed."""

import os
import pty
from pathlib import Path

from nvdimm_driver.cmd.ctl.terminal import for_terminal


def test_a_terminal_gets_colours_and_no_other_order() -> None:
    main, sub = pty.openpty()
    with os.fdopen(sub, "w") as stream:
        shown = for_terminal(stream)
        assert shown.write("\033[31mFAIL\033[0m\ta\x1b[8mb\x9b2J\r\udcff\u00e4\u202ec\n") == 29
        shown.flush()
        said = os.read(main, 1000)
    os.close(main)
    assert said == b"\033[31mFAIL\033[0m\ta\\x1b[8mb\\x9b2J\\x0d\\udcff\xc3\xa4\\u202ec\r\n"


def test_a_file_gets_all_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        assert for_terminal(stream) is stream
