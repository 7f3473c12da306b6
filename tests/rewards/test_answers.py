"""Answers found in texts and compared, and leaks seen."""

import time

import pytest

from atlas_jax.rewards.answers import extract_answer, is_correct, normalise

EXTRACTED = [
    # solution tags
    ("so <solution>42</solution>", "42"),
    ("<solution>1</solution> no, <solution> 2 </solution>", "2"),
    ("<SOLUTION>7 apples.</SOLUTION>", "7 apples"),
    ("<solution>42</solution> and <solution>43", "42"),
    ("<solution>1 <solution>2</solution> 3</solution>", "2"),
    ("<solution>5</solution> I wrote it in <solution></solution>.", "5"),
    (r"<solution>thus \boxed{5} apples</solution> \boxed{6}", "5"),
    ("<solution>Answer: 8</solution>", "8"),
    ("<solution>**Final Answer:** $8$</solution>", "8"),
    ("<solution>\n\\[\n42\n\\]\n</solution>", "42"),
    ("<solution>\nShe has 3.\nShe buys 4, so 7 in all.\n</solution> or 9", "7"),
    ("<solution>3 + 4\nAnswer: 7\nQED 1</solution>", "7"),
    ("the answer is 1 <solution>x = 3, y = 4</solution>", "x = 3, y = 4"),
    # boxes
    (r"\boxed{42}", "42"),
    (r"\boxed{1} then \fbox{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"$\boxed{\sqrt{\frac{1}{2}}}$ as {asked}", r"\sqrt{\frac{1}{2}}"),
    (r"\boxed{5} and \boxed{6", "5"),
    (r"\boxed{ unclosed and \boxed{6}", "6"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{[1, 2\}} of \}", r"[1, 2\}"),
    (r"\boxed{\text{Paris}}", "Paris"),
    (r"\boxed{$x + 1$ or **2**}", "x + 1 or 2"),
    (r"\boxed{2**3}", "2**3"),
    (r"\boxed{5 \$ of 6 \$ here}", r"5 \$ of 6 \$ here"),
    (r"\boxed{\boxed{4}}", "4"),
    (r"put it in \boxed{}: the answer is 3", "3"),
    (r"\boxed{7} but the answer is 8", "7"),
    # GSM8K
    ("He has 3.\n#### 18", "18"),
    ("#### 1\n#### 1,234 \n", "1,234"),
    ("#### Step 1\nadd\n#### Step 2\nThe answer is 12.", "12"),
    ("add\n#### Paris", "Paris"),
    ("#### 5\nI hope that the answer is clear", "5"),
    ("##### 5\nso 6", "6"),
    ("#### Final Answer: $12$", "12"),
    # markers
    ("Final Answer: 12", "12"),
    ("**Final Answer:** 12", "12"),
    ("**Final Answer**: **12**", "12"),
    ("Final answer:\n\n12\n\nHope this helps!", "12"),
    ("Answer: The answer is 6 * 7 = 42.", "42"),
    ("The final answer is 42. I used 3 steps.", "42"),
    ("The answer is: $1,999.", "1,999"),
    ("ANSWER = yes", "yes"),
    ("**Answer** : no, of 3", "no, of 3"),
    ("the correct answer is: **no**", "no"),
    ("Answer: 3\nAnswer: 4\nanswer: 5", "5"),
    ("Answer: 5\nAnswer:", "5"),
    ("Answer: 5\nThe answer is", "5"),
    ("The answer is 42 because 6 times 7 is 42", "42"),
    ("The answer is 6*7 = 42, so there are 42 apples", "42"),
    ("Answer: x = 3, y = 4", "x = 3, y = 4"),
    ("Answer: x = 3 and y = 4", "x = 3 and y = 4"),
    ("The answer is Mr. Smith. He is tall.", "Mr. Smith"),
    ("The answer is Mrs. St. John. She is not.", "Mrs. St. John"),
    ('the answer is "Paris".', "Paris"),
    ("the answer is `Paris`", "Paris"),
    (r"The answer is \(\frac{3}{4}\).", r"\frac{3}{4}"),
    (r"The answer is $12 \text{ cm}$.", "12  cm"),
    ("The correct answer is (B) Paris.", "(B) Paris"),
    ("the answer is 5 or 6", "5 or 6"),
    ("Answer: 15 apples (10 + 5)", "15 apples"),
    (r"so the answer is $\$32{,}348$.", r"\$32{,}348"),
    # not markers
    ("unanswered: 3 and 4", "4"),
    ("my_answer: yes, of 2", "2"),
    ("answers: none but 8", "8"),
    # the last number
    ("first 3, then 7.", "7"),
    ("it costs $1,234.50!", "1,234.50"),
    ("10-5", "5"),
    ("so it is -5", "-5"),
    (r"we get $\frac{1}{2}$", "1/2"),
    ("H2O", None),
    ("thus 12 and y = 2x", "12"),
    ("4 of 1.2.3", "1.2"),
    ("4 of 1,2345", "2345"),
    ("a box of 5KG", "5"),
    # an option alone
    ("(B)", "(B)"),
    ("B) 12 apples", "B) 12 apples"),
    # nothing
    ("I do not know", None),
    ("", None),
    ("Answer:", None),
    ("<solution> </solution>", None),
    (r"\boxed{$$}", None),
]

NORMALISED = [
    ("1,234", "1234"),
    ("1,234,567.50", "2469135/2"),
    ("1,2345", "1,2345"),
    ("1, 234", "1,234"),
    ("$18", "18"),
    ("-$18.00", "-18"),
    ("€ 18", "18"),
    ("18 dollars", "18"),
    ("18%", "18"),
    (r"18\%", "18"),
    (r"\$18", "18"),
    (r"\frac{1}{2}", "1/2"),
    (r"\dfrac{6}{4}", "3/2"),
    (r"-\tfrac{1}{2}", "-1/2"),
    (r"\frac12", "1/2"),
    (r"\frac{-1}{2}", "-1/2"),
    ("6/4", "3/2"),
    ("6/3", "2"),
    ("3 / -4", "-3/4"),
    ("1 1/2", "3/2"),
    (r"1\frac{1}{2}", "3/2"),
    ("-1 1/2", "-3/2"),
    ("1/0", "1/0"),
    ("0.50", "1/2"),
    (".55", "11/20"),
    ("10 11/22", "21/2"),
    ("3.0", "3"),
    ("3.", "3"),
    ("007", "7"),
    ("-0", "0"),
    ("0.1", "1/10"),
    ("1.5e3", "1500"),
    ("1E-2", "1/100"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2 x 10^-1", "1/5"),
    ("3 Million", "3000000"),
    ("2.5 thousand dollars", "2500"),
    ("7 apples", "7"),
    ("7 apples in the basket.", "7"),
    ("3/4 of the cake", "3/4"),
    ("1. Paris", "1.paris"),
    ("5 km/h", "5"),
    ("5km", "5"),
    ("9.8 m/s^2", "49/5"),
    (r"12 \text{ cm}", "12"),
    (r"12\,\mathrm{cm}^2", "12"),
    (r"90^\circ", "90"),
    ("20 °C", "20"),
    (r"10\,000", "10000"),
    ("10{,}000", "10000"),
    ("\u22125", "-5"),
    ("- 5", "-5"),
    ("+5", "5"),
    ("x = 5", "5"),
    (r"\theta = \frac{1}{2}", "1/2"),
    ("total cost = $18", "18"),
    ("f(x) = 2x", "2x"),
    ("y = 2x + 1", "2x+1"),
    ("2x", "2x"),
    ("2 x", "2 x"),
    (r"2\pi", r"2\pi"),
    ("2 pi", "2 pi"),
    ("2xy", "2xy"),
    ("3 and 4", "3 and 4"),
    ("3-5", "3-5"),
    ("3:30", "3:30"),
    ("2^{10}", "2^{10}"),
    ("The  Eiffel\nTower.", "eiffel tower"),
    ("A", "a"),
    ("a + b", "a+b"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"a \leftarrow b \quad c", r"a\leftarrow b c"),
    (r"\frac{\text{ab}}{2}", "ab/2"),
    (r"\{5\}", "{5}"),
    ("top of the hill", "top of hill"),
    (r"\text{Yes}", "yes"),
    ("“Yes!”", "yes"),
    ("**no**", "no"),
    (r"x^{2} + 1", "x^2+1"),
    (r"\frac{\sqrt{3}}{3}", r"\sqrt3/3"),
    (r"\frac{a + b}{2}", "(a+b)/2"),
    ("", ""),
    (" . ", ""),
]

CORRECT = [
    ("<solution>18</solution>", "18"),
    ("<solution>$18.00</solution>", "She has 9 eggs, 9 * 2 = 18.\n#### 18"),
    ("the answer is 0.5", r"So $\boxed{\frac{1}{2}}$"),
    ("Final Answer: 1,999", "1999"),
    ("<solution>48 + 24 = 72</solution>", "72"),
    ("<solution>48 + 24 = 72 clips</solution>", "72"),
    ("<solution>x^2 + y^2 = 25</solution>", "x^2+y^2 = 25"),
    ("<solution>John has 7 apples left</solution>", "7"),
    ("Answer: He paid $1,000.50 in total.", "1000.5"),
    ("Answer: Total: 7", "7"),
    ("<solution>7 apples</solution>", "7"),
    ("<solution>7</solution>", "7 apples"),
    ("the answer is (B)", "B"),
    ("Answer: B.", "B"),
    ("Answer: B) Paris", "B"),
    ("Answer: **(B)** Paris", "B"),
    ("B", "(B)"),
    ("(B)", "B) Paris"),
    ("Answer: Paris", "B) Paris"),
    ("Answer: B. Paris", "Paris"),
    (r"\boxed{\text{(b)}}", "B"),
    ("The answer is the Eiffel Tower.", "Eiffel tower"),
    ("<solution>Yes</solution>", "yes"),
    ("<solution>٤٢</solution>", "42"),
]

WRONG = [
    ("<solution>1,234</solution>", "1"),
    ("Final Answer: 1,999", "1,234"),
    ("18", "19"),
    ("nothing", "5"),
    ("<solution>5 or 6</solution>", "5"),
    ("<solution>5 or 6</solution>", "6"),
    ("<solution>x = 3, y = 4</solution>", "4"),
    (r"<solution>2\pi</solution>", "2"),
    (r"<solution>\sqrt{5}</solution>", "5"),
    ("<solution>Sqrt of 5</solution>", "5"),
    ("<solution>not 7 or anything</solution>", "7"),
    ("<solution>5x</solution>", "5"),
    ("Answer: (A)", "B"),
    ("Answer: A, B, C, D", "A"),
    ("Answer: A) B) C) D)", "A"),
    ("Answer: (A) or (B)", "A"),
    ("Answer: a cat", "A"),
    ("Answer: B) Paris", "A) Paris"),
    ("the answer is -5", "5"),
    ("<solution>?</solution>", "!"),
    ("anything", ""),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_answer_is_found(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(("answer", "form"), NORMALISED)
def test_equal_answers_have_one_form(answer, form):
    assert normalise(answer) == form


@pytest.mark.parametrize(("text", "truth"), CORRECT)
def test_right_answer_is_right(text, truth):
    assert is_correct(text, truth)


@pytest.mark.parametrize(("text", "truth"), WRONG)
def test_wrong_answer_is_wrong(text, truth):
    assert not is_correct(text, truth)


@pytest.mark.parametrize("form", [f for _, f in NORMALISED if f not in ("1,234", "{5}")])
def test_form_of_a_form_is_itself(form):
    assert normalise(form) == form


SIZE = 100_000
PIECES = [
    "<solution>", "</solution>", "<solution></solution>", "<solution>.</solution>", r"\boxed{", "{",
    "}", r"\boxed{}", r"\boxed{{}", r"\frac{", r"\frac{1}{", r"\frac{1}{2}", r"\text{", r"\text{a}",
    "Answer:", "Answer: \n", "answer is ", "answer = 1 ", "final ", "final answer * ", "answer ",
    "answer: a, b = ", "= , ", "#### ", "#### a\n", "####", "1", "1,111,", "1 ", "1/", "1/1 ", "1.",
    "1e9 ", ".5", "-", "$", "$1", "*", "**", "a", "a ", " ", "\n", ". ", ", so ", "B) ", "(B) ",
    "option ", "option is ", "^{", "\\", "\\,", r"\quad", "°", "²", "1 and ", "'", "the ",
    "1 million ",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_text_takes_linear_time(piece):
    text = "answer is " + piece * (20_000 // len(piece)) + "!"
    start = time.process_time()
    for hostile in (text, f"<solution>{text}</solution>"):
        is_correct(hostile, "5")
        normalise(hostile)
    assert time.process_time() - start < 10  # minutes, if it were quadratic


MORE_PIECES = [
    "<answer>", '"answer": "', "ans: ", "# answer\n", "one hundred and ", "(", "[", "[1,", "\\{1,",
    r"\sqrt{", "(x+1)", "9^9", "x = 1, ", " or ", r"\pm ", r"\cup ", "<= ", r"\begin{matrix}", "½",
    "⁸", "```\n", "yes, ", "pick B ", "May 1 ", "$x$", "答案是", "in 5 ", "5 hours ", r"1\over ",
]  # fmt: skip


@pytest.mark.parametrize("piece", MORE_PIECES)
def test_hostile_answer_is_compared_in_linear_time(piece):
    text = piece * (20_000 // len(piece))
    start = time.process_time()
    is_correct(text, "x + 1, B")
    is_correct(f"<solution>{text}</solution>", text)
    assert time.process_time() - start < 10  # minutes, if it were quadratic


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<solution>5</solution>" + "<solution>" * 10_000, "5"),
        (r"\boxed{5}" + r"\boxed{" * 15_000, "5"),
        (r"\boxed{" + "{" * 50_000 + "5" + "}" * 50_000 + "}", "{" * 50_000 + "5" + "}" * 50_000),
        ("Answer: 4\n" * 10_000 + "Answer: 5" + "\nAnswer:" * 10_000, "5"),
        ("the answer is 5" + " " * 100_000, "5"),
        ("answer " * 15_000 + "5", "5"),
        ("#### " * 20_000 + "5", "5"),
        ("x" * 100_000 + " 5 " + "x" * 100_000, "5"),
    ],
    ids=["tags", "boxes", "braces", "markers", "spaces", "words", "hashes", "letters"],
)
def test_answer_is_found_in_a_long_hostile_text(text, answer):
    assert extract_answer(text) == answer


def test_huge_numbers_are_compared_as_text():
    digits = "9" * 1_000_000
    assert normalise(digits) == digits
    assert normalise("1e999999999") == "1e999999999"
    assert normalise("1e-999999999") == "1e-999999999"
    assert normalise("1 / 1e" + digits) == "1/1e" + digits
    assert not is_correct("Answer: 1e999999999", "1")
    assert normalise("1e100") == "1" + "0" * 100
