"""What a GPU is to launch, counted in a listing that XLA (jaxlib 0.10.1) wrote for an epoch of `fit` on an H100."""

import re
from pathlib import Path

import pytest

from benchmarks.kernels import count

LISTING = (Path(__file__).parent / "reference" / "gpu_launches.txt").read_text()


def test_a_step_is_the_innermost_loop():
    # By hand: lines 065 to 104 of the listing, in one command buffer.
    assert count(LISTING) == (40, 1)


def test_without_command_buffers_the_host_launches_each():
    one_buffer = re.compile(r"^        000: kCommandBuffer.*\n", re.MULTILINE)
    assert count(one_buffer.sub("", LISTING)) == (40, 40)


def test_what_follows_the_loop_is_not_the_step_s():
    assert "105: kCopy" in LISTING
    assert count(re.sub(r"^    105: .*\n", "", LISTING, flags=re.MULTILINE)) == count(LISTING)


def test_what_is_nested_behind_the_loop_is_not_the_step_s_either():
    """As XLA of jaxlib 0.11.2 lists it."""
    behind = (
        "    106: kAsyncStart",
        "        108: kDynamicSliceFusion",
        "            107: kCopy",
        "    109: kAsyncDone",
    )
    assert count(LISTING + "\n".join(behind)) == count(LISTING)


def test_for_a_loop_in_a_command_buffer_the_host_launches_nothing():
    listing = """000: kWhile
  body:
    000: kCommandBuffer
        001: kWhile
condition:
            002: kCustomKernel
          body:
            003: kCustomKernel
            004: kGemm
        005: kCopy
"""
    assert count(listing) == (2, 0)
    assert count(listing.replace("kCommandBuffer", "kSequential")) == (2, 2)


def test_a_program_without_a_loop_is_counted_whole():
    assert count("000: kCopy\n001: kCommandBuffer\n    002: kKernel\n    003: kGemm\n") == (3, 2)


def test_a_listing_of_another_form_is_refused():
    with pytest.raises(ValueError, match="this version of XLA may list them otherwise"):
        count("fusion.1\n")
