"""Post-processing, against results worked out by hand from the rules."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.evals.scoring.math_answers import boxed, final_answer
from minicpm_mlx.evals.scoring.parsing import (
    bbh_answer,
    grade_school_number,
    humaneval_body,
    mbpp_code,
)


def test_the_number_of_a_solution() -> None:
    expected = {
        "So 3*4=<<3*4=12>>12.\n#### 12": "12",
        "#### 1,234": "1234",
        "#### -7": "-7",
        "#### 12\n\nQuestion: next?\nAnswer: #### 99": "12",
        "####12": "####12",  # without the space it is no answer, and no word of digits
        "He pays $<<5*7=35>>$1,234.50. Done": "1234.50",
        "<<1+1=2>>2 and then <<2+2=4>>4 apples": "4",
        "all <<1+1=2>>": "2>>",  # nothing after the mark: that after "=" it is
        "x = 5 and y = $1,234.50.": "1234.50",
        "5 apples and 7 pears": "7",
        "it costs $18": "it costs $18",
        "3.5": "3.5",
        "": "",
        "=": "=",
    }
    for reply, number in expected.items():
        assert grade_school_number(reply) == number, reply


def test_a_body_ends_where_its_function_does() -> None:
    expected = {
        "    return 1\n\ndef next():\n    pass": "    return 1\n",
        "    return 1\nclass A: ...": "    return 1",
        "    return 1\n# done": "    return 1",
        "    return 1\n@cache\ndef f(): ...": "    return 1",
        "    return 1\nprint(f(1))": "    return 1",
        "    return 1\nif __name__ == '__main__':\n    f()": "    return 1",
        "    return 1<|endoftext|>more": "    return 1",
        "    if x:\n        return 1\n    # why\n    return 2": None,
        "def f(): ...": None,
        "": None,
    }
    for reply, body in expected.items():
        assert humaneval_body(reply) == (reply if body is None else body), reply


def test_code_ends_where_the_next_problem_begins() -> None:
    expected = {
        "\ndef f():\n    return 1\n": "def f():\n    return 1",
        # odd: the next problem begins and is not finished
        'def f():\n    return 1\n\n"""Write a': "def f():\n    return 1",
        'def f():\n    """Doc."""\n    return 1\n"""Next': "def f():",
        # even: pairs; a def follows
        'def f():\n    return 1\n"""Next"""\ndef g(): ...': "def f():\n    return 1",
        'def f():\n    """Doc."""\n    return 1': 'def f():\n    """Doc."""\n    return 1',
        '"""Doc."""\nx = 1\n"""Doc."""\ndef f(): ...': "",
        "": "",
    }
    for reply, code in expected.items():
        assert mbpp_code(reply) == code, reply


def test_what_is_announced_is_the_answer() -> None:
    expected = {
        "> ]": "> ]",
        " 24\n\nQuestion:\nmore": "24",
        "We count. So the answer is 8.": "8",
        "So the answer is 8. So the answer is 9.": "9",
        "the answer is (B)": "(B)",
        "the answer is (B).": "(B).",  # only the sentence of the examples loses its stop
        "答案是 7": "7",
        "First paragraph.\n\nSo the answer is 8.": "First paragraph.",
        "": "",
    }
    for reply, answer in expected.items():
        assert bbh_answer(reply) == answer, reply


def test_the_inside_of_the_last_box() -> None:
    expected = {
        r"so $\boxed{5}$.": "5",
        r"first \boxed{1}, then \boxed{\frac{1}{2}}": r"\frac{1}{2}",
        r"\boxed{\boxed{3}}": "3",  # the last command is the inner one
        r"\boxed{\text{a {b} c}} end": r"\text{a {b} c}",
        r"\fbox{9}": "9",
        r"it is $\boxed 7$": "7",
        r"\boxed{unclosed": None,
        "no box": None,
    }
    for solution, inside in expected.items():
        assert boxed(solution) == inside, solution


def test_answers_of_mathematics_in_normal_form() -> None:
    expected = {
        r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.": r"\frac{1}{2}",
        "Work.\nFinal Answer: The final answer is $5$. I hope it is correct.": "5",
        "The final answer is $1$.\nTherefore it is $2$.": "2",  # from the end
        "Thus it is $1$. Hence it is $2$.": "1",  # in a line from the beginning
        "It is 7. More text": "Itis7",  # no conclusion: before the first stop
        "$7$": "7",
        r"\frac12": r"\frac{1}{2}",
        r"\frac1{72}": r"\frac{1}{72}",
        r"\dfrac{3}{4}": r"\frac{3}{4}",
        r"\tfrac 34": r"\frac{3}{4}",
        "3/4": r"\frac{3}{4}",
        "3/4/5": "3/4/5",
        r"\sqrt3": r"\sqrt{3}",
        r"\sqrt{2}": r"\sqrt{2}",
        r"\boxed{12}": "12",
        r"\text{east}": "east",
        r"90^\circ": "90",
        r"25\%": "25",
        r"\$18": "18",
        "10,000": "10000",
        r"10{,}000": "10000",
        "12 inches": "12",
        r"5\text{ cm}": "5",
        "x=5": "5",
        "f(x)=5": "f(x)=5",
        r"\left(1,2\right)": "(1,2)",
        "3.14": "3",  # numbers end at the stop, on both sides
        "": "",
        "\\frac": "\\frac",
    }
    for text, answer in expected.items():
        assert final_answer(text) == answer, text


@given(st.text(alphabet=st.sampled_from("\\{}$.,/= \n019abfrqstxoc%^\"'#>"), max_size=60))
def test_no_reply_breaks_the_parsers(reply: str) -> None:
    for parse in (grade_school_number, humaneval_body, mbpp_code, bbh_answer, final_answer):
        assert isinstance(parse(reply), str)
    inside = boxed(reply)
    assert inside is None or inside in reply


@given(st.integers(-(10**9), 10**9))
def test_a_stated_number_comes_back(number: int) -> None:
    assert grade_school_number(f"Some steps = 5.\n#### {number:,}") == str(number)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_all_spellings_of_a_fraction_are_one(over: int, under: int) -> None:
    spellings = (
        rf"\frac{{{over}}}{{{under}}}",
        rf"\frac{over}{under}",
        rf"\dfrac{{{over}}}{{{under}}}",
        f"{over}/{under}",
        rf"$\tfrac{over}{{{under}}}$",
    )
    assert len({final_answer(spelling) for spelling in spellings}) == 1
