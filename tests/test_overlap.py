import threading

import pytest

from utils.overlap import Behind, ahead


@pytest.mark.parametrize("count", [0, 1, 5])
def test_items_come_in_their_order_and_all_of_them(count):
    assert list(ahead(range(count))) == list(range(count))


def test_an_item_is_made_while_the_one_before_it_is_in_use():
    made = [threading.Event() for _ in range(3)]

    def items():
        for event in made:
            event.set()
            yield event

    stream = ahead(items())
    assert next(stream) is made[0]
    assert made[1].wait(timeout=30)
    assert not made[2].is_set()
    stream.close()


def test_an_error_of_the_items_comes_after_those_before_it():
    def items():
        yield 1
        raise KeyError("broken")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="broken"):
        next(stream)


def test_calls_are_made_in_order_by_another_thread_and_done_at_the_end():
    done = []
    with Behind() as behind:
        for number in range(20):
            behind(lambda n: done.append((n, threading.current_thread())), number)
    assert [number for number, _ in done] == list(range(20))
    assert threading.main_thread() not in {thread for _, thread in done}


@pytest.mark.parametrize("calls_after", [0, 1])
def test_an_error_of_a_call_is_raised(calls_after):
    done = []

    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), Behind() as behind:  # noqa: PT012
        behind(broken)
        for _ in range(calls_after):
            behind(done.append, 1)
    assert done == []


def test_an_error_of_the_block_itself_is_the_one_that_is_raised():
    with pytest.raises(ZeroDivisionError), Behind() as behind:  # noqa: PT012
        behind(int, "no number")
        raise ZeroDivisionError


def test_as_many_calls_as_the_limit_wait_and_the_next_one_is_waited_for():
    gate, done = threading.Event(), []

    def slow(number):
        gate.wait(timeout=30)
        done.append(number)

    with Behind(limit=3) as behind:
        for number in range(3):
            behind(slow, number)
        assert done == []
        threading.Timer(0.1, gate.set).start()
        behind(slow, 3)
        assert done[0] == 0
        behind.wait()
        assert done == [0, 1, 2, 3]
