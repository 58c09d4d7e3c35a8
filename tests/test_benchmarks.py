import dataclasses

import pytest

from benchmarks.all import Config, number, run, table_lines
from benchmarks.rows import CPU_ROWS, CUDA_ROWS, Machine, network_flops
from utils.errors import UserError

MACHINE = Machine(flops=1e11, copied_bytes=1e10, number_type="float32")


def test_a_row_runs_its_script_and_reads_ratio_limit_and_share():
    row = CPU_ROWS[0]
    output = run(row, Config(small=True))
    (line,) = table_lines(row, output, MACHINE, with_limit=True)
    _, what, script, aim, measured, limit, share, _ = (cell.strip() for cell in line.split("|"))
    assert (what, script, aim) == (row.figures[0].what, "`benchmarks.loss`", "8 x")
    assert f"ratio {float(measured):.2f}" in output
    assert limit.endswith("ms")
    assert "% of" in share


def test_a_row_for_a_gpu_runs_small_without_one():
    output = run(CUDA_ROWS[0], Config(device="cuda", small=True))
    assert table_lines(CUDA_ROWS[0], output, MACHINE, with_limit=False)


def test_a_script_that_fails_is_shown():
    row = dataclasses.replace(CPU_ROWS[0], small="--rounds none")
    with pytest.raises(UserError, match=r"(?s)benchmarks\.loss --rounds none failed.*rounds"):
        run(row, Config(small=True))


def test_an_output_without_the_figure_is_an_error():
    assert number(r"took ([\d,]+) ms", "it took 1,234 ms") == 1234
    with pytest.raises(UserError, match="no line like"):
        number(r"took ([\d,]+) ms", "it took long")


def test_the_work_of_the_network_is_darknets():
    assert network_flops() / 1e9 == pytest.approx(59.6, abs=0.6)
