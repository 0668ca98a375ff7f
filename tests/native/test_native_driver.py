"""csrc/cpu without Python: random networks against double precision, sanitizers, planted defects, other processors."""

import re
import shutil
from subprocess import CalledProcessError

import pytest

from setup import CSRC
from tests.driver import Driver, changed, run
from tests.sanitize import SANITIZERS, check

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the driver with")


@pytest.mark.parametrize("name", SANITIZERS)
def test_sanitizers(name, tmp_path):
    """Silent on what is there, and not on what is planted. All instruction sets: python -m tests.sanitize."""
    check(name, tmp_path, ("generic",), networks=12)


ALLOCATES = (
    "cpu/executor/executor.cpp",
    "  const Program program = this->program();\n  run_teams(images",
    "  const Program program = this->program();\n  const std::vector<char> planted(1024);\n  run_teams(images",
)


def test_no_allocation_inside_a_call(tmp_path):
    """Batches above and below the tuned one, fewer images than threads; one that is planted is counted."""
    driver = Driver(tmp_path, ["-O1"])
    run(driver.build(), 60, "float32", 3)
    with pytest.raises(CalledProcessError) as counted:
        run(driver.build("planted", changed(*ALLOCATES)), 60, "float32", 3)
    assert "takes memory in a call" in counted.value.stderr


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="there is no aarch64-linux-gnu-g++")
def test_arm(tmp_path):
    """Compiles for 64-bit Arm without a warning; agrees with double precision there, if there is an emulator."""
    path = Driver(tmp_path, ["-O1", "-static", "-Werror"], cxx="aarch64-linux-gnu-g++").build()
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("compiled, but there is no qemu-aarch64-static (qemu-user-static) to run it")
    for precision in ("float32", "bfloat16", "direct", "winograd"):
        assert "they agree" in run("qemu-aarch64-static", path, 15, precision, 2)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ (clang)")
def test_clang(tmp_path):
    """Compiles without a warning, and agrees."""
    path = Driver(tmp_path, ["-O1", "-Werror", "-Wno-unknown-warning-option"], cxx="clang++").build()
    assert "they agree" in run(path, 15, "winograd", 2)


WINOGRAD, PACK = "cpu/executor/winograd.h", "cpu/executor/pack.cpp"
EMBED, BACKWARD, ATTENTION = (f"cpu/executor/{name}.h" for name in ("embed", "backward", "attention"))
HEADS, LINEAR, CHANNELS = (f"cpu/executor/{name}.h" for name in ("heads", "linear_attention", "channel_norm"))
DIRECT, ACTIVATION = (f"cpu/executor/{name}.h" for name in ("direct", "activation"))
# function → what its coefficients stand at: every term that it reads, every number and named constant
PLACES = {
    (WINOGRAD, "transform_input"): r"\bd\[\d\]|\b\d+\.?\d*f\b|\bkRoot\w+",
    (WINOGRAD, "transform_output"): r"\bm\[\d\]|\b\d+\.?\d*f\b|\bkRoot\w+",
    (PACK, "WeightTransform"): r"std::sqrt\(\d\.\d\)|std::pow\([^)]*\)|\bproduct;|(?<=g\[5\]\[2\] = )1",
    (PACK, "transform_winograd"): r"\bg\[[ij]\]\[\d\]",
    (PACK, "widen_for_pool"): r"\b0\.25\b",
    (EMBED, "sin_cos"): r"\bkHalfPi\b|(?<=-)\.5f",
    (EMBED, "embed"): r"\btable\[\d\]",
    (EMBED, "store_gradient"): r"\btable\[\d\]|\by\[\w+\]|\bkHalfPi\b",
    (BACKWARD, "slope"): r"\b[sy](?= \*)",
    (BACKWARD, "norm_backward_of"): r"\bxhat\.(?:gamma|beta|r)\b|\bshare(?=\))|(?<=\* )product\b|(?<=- )mean\b",
    (ATTENTION, "product_block"): r"(?<=\* )scale\b",
    (ATTENTION, "softmax"): r"(?<=\* )share\b",
    (ATTENTION, "attention_backward"): r"\bat\.scale\b|(?<=- )mean\b",
    (HEADS, "read_queries"): r"1\.44269504f|\bscale(?= \* q)",
    (LINEAR, "make_context"): r"(?<=\* )share\[d\]",
    (LINEAR, "answer"): r"1\.44269504f|(?<=\* )share\b",
    (CHANNELS, "normalise_row"): r"\bshare(?=[ ;])(?! =)|(?<=- mean\) \* )scale\b|\bgamma\[c\]|\bbeta\[c\]",
    (DIRECT, "direct_phase"): r"\blayer\.add_scale\[a\]|(?<=\+ )bias\b",
    (ACTIVATION, "activate"): r"1\.5957691216057308f|(?<=x \* )slope\b",
}


def body(text, function):
    """(begin, end) of the braces that follow the name's first mention."""
    begin = text.index("{", re.search(rf"\b{function}\b", text).start())
    depth = 0
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return begin, i
    raise ValueError(f"{function}: no end")


def planted():
    """The sources with a factor at every coefficient of PLACES, and what stands at each."""
    texts = {file: (CSRC / file).read_text() for file, _ in PLACES}
    places = []

    def factor(match):
        places.append(match[0])
        token, end = (match[0][:-1], ";") if match[0].endswith(";") else (match[0], "")
        return f"({token} * ::sgm::planted[{len(places) - 1}]){end}"

    for (file, function), pattern in PLACES.items():
        begin, end = body(texts[file], function)
        found = re.sub(pattern, factor, texts[file][begin:end])
        assert found != texts[file][begin:end], f"{function}: no coefficient found, adapt PLACES"
        texts[file] = texts[file][:begin] + found + texts[file][end:]
    head = "namespace sgm { extern float planted[]; }\n"
    return {file: head + text for file, text in texts.items()}, places


def test_every_coefficient_counts(tmp_path):
    """One part in 10,000 more in any one of them, and the random networks no longer agree with double precision."""
    edited, places = planted()
    driver = Driver(tmp_path, ["-O1", f"-DSGM_PLANTED={len(places)}"])
    driver.build()
    path = driver.build("planted", edited)
    for precision in ("winograd", "direct"):
        run(path, 60, precision, 1)  # factors of 1
    unnoticed = []
    for i, place in enumerate(places):
        precision = "direct" if place in ("0.25", "layer.add_scale[a]") else "winograd"
        try:
            run(path, 60, precision, 1, SGM_PLANT=str(i))
        except CalledProcessError as noticed:
            assert "differs from double precision" in noticed.stderr, noticed.stderr
            continue
        unnoticed.append((i, place))
    assert len(places) > 50 and not unnoticed
