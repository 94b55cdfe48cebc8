"""Signals that stop a program."""

import signal
import subprocess
import sys
import time


def test_second_ctrl_c_ends_at_once_and_two_in_a_moment_are_one():
    code = (
        "import signal, time; from odcft.distributed import stop_signals as stopping\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "listening = stopping.handling_signals(); listening.__enter__()\n"  # (a shell's background ignores SIGINT)
        "with stopping.deferred():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(2); print('still here', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for pause in (0.1, 1.5):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "stopping after this step" in err
    assert "ended at once" in err
