"""Lessons that give the answer away, and those that only look like it."""

import time

import pytest
from num2words import num2words

from atlas_jax.rewards.leaks import states_answer

STATED = [
    ("think of 5 apples", "5", True),
    ("it is 15 or 3.5 or 5/6 or x5", "5", False),
    ("Result: 5.", "5", True),
    ("It is **5**!", "5", True),
    (r"$\boxed{5}$", "5", True),
    (r"$\boxed{\frac{1}{2}}$", "1/2", True),
    ("so...5", "5", True),
    ("use 5x and the 5th row and x^5", "5", False),
    ("a box of 5kg", "5", True),
    ("that is 1,234 in all", "1234", True),
    ("that is 1,234 in all", "234", False),
    ("of 2,3,5 take one", "3", True),
    ("that is 1234 dollars", "$1,234", True),
    ("count 10-5 first", "5", True),
    ("count 10-5 first", "-5", False),
    ("it is -5", "5", False),
    ("it is -5", "-5", True),
    ("halve it: 0.5", "1/2", True),
    (r"halve it: \frac{1}{2}", "0.5", True),
    ("divide 6/2", "3", False),
    ("take 1 1/2 cups", "1.5", True),
    ("about 3 million people", "3,000,000", True),
    ("divide by 1/0", "0", False),
    ("it is 18", "9 * 2 = 18\n#### 18", True),
    ("multiply 9 by 2", "9 * 2 = 18\n#### 18", False),
    ("Think of PARIS, the capital", "Paris", True),
    ("Think of parish", "Paris", False),
    ("look at the\n Eiffel  Tower", "The Eiffel Tower", True),
    ("write 2x + 1 there", "2x+1", True),
    ("write 12x + 1 there", "2x+1", False),
    ("write 2x 1 there", "2x+1", False),
    (r"see the **Eiffel** \(Tower\)", "Eiffel Tower", True),
    ("choose (B)", "B", True),
    ("the answer is B", "B", True),
    ("the answer is Bob", "B", False),
    ("The answer is: **B**.", "B", True),
    ("the correct option is B because", "B", True),
    ("Pick B", "(B)", True),
    ("Let B be a set; a Bear", "B", False),
    ("the answer is a number", "A", False),
    ("a look at a map", "A", False),
    ("It lies in Paris", "B) Paris", True),
    ("It lies in France", "B) Paris", False),
    ("", "5", False),
    ("5", "", False),
    ("anything", " . ", False),
]
TRAIN = "A train goes 120 miles in 2 hours at a constant rate. What is its speed?"
PENCILS = "7 boxes hold 12 pencils each. How many pencils are that?"
MAMMAL = "Which of these is a mammal?\nA. trout\nB. whale\nC. eagle\nD. frog"
CITY = "What is the capital of France?"
ASKED = [
    # what the question says, and what it says of itself
    (TRAIN, "60", "120 / 2", False),
    (TRAIN, "60", "Divide 120 by 2.", False),
    (TRAIN, "60", "120 miles in 120 minutes, that is 60 minutes an hour", False),
    (TRAIN, "60", "There are 60 minutes in an hour, and it goes 60 miles.", True),
    (TRAIN, "60", "120 / 2 = 60", True),
    (TRAIN, "120", "It goes 120 miles, so what is asked?", False),
    (TRAIN, "120", "So it comes to 120. Write that.", True),
    (TRAIN, "120", "The answer is 120.", True),
    (TRAIN, "120", "Divide.\n120 miles\n", True),
    # sums
    (TRAIN, "60", "Think of 55 + 5.", True),
    (TRAIN, "60", "fifty plus ten", True),
    (TRAIN, "60", "It is one more than 59.", True),
    (TRAIN, "60", "It is 2 less than 62.", True),
    (TRAIN, "60", "six tens", True),
    (TRAIN, "60", "the number after 59", True),
    (PENCILS, "84", "7 * 12", False),
    (PENCILS, "84", "7 * 10 = 70 and 7 * 2 = 14. Then 70 + 14.", False),
    (PENCILS, "84", "seven times twelve", False),
    (PENCILS, "84", "Take 80 and then add 4.", True),
    (PENCILS, "84", "Take 7 and then add 12.", False),
    (PENCILS, "81", "9 squared", True),
    (PENCILS, "9", "the square root of 81", True),
    (PENCILS, "300", "a three followed by two zeros", True),
    # in other forms
    (PENCILS, "5/8", "That is five eighths.", True),
    (PENCILS, "5/8", "There are 5 eighth graders.", False),
    (PENCILS, "84", "an eight followed by a four", True),
    (PENCILS, "84", "EIGHTY-FOUR", True),
    (PENCILS, "84", "eighty-five or eighty-three", False),
    (PENCILS, "84", "8 4", True),
    (PENCILS, "84", "an 8, and then as the last digit a four", False),
    (PENCILS, "84", "The first digit is 8, the second digit is 4.", True),
    (PENCILS, "84", "48 backwards", True),
    (PENCILS, "84", "0b1010100 or LXXXIV or ODQ or 0x54", True),
    (PENCILS, "84", "1010100 in binary", True),
    (PENCILS, "84", "LXXXV", False),
    (PENCILS, "84", "ochenta y cuatro", True),
    (PENCILS, "84", "8 boxes or 4 boxes", False),
    ("Which can be divided by 5: 29, 52 or 85?", "85", "It begins with 8.", True),
    ("Which can be divided by 5: 29, 52 or 85?", "85", "It ends in 0 or 5.", False),
    # small numbers, which every lesson has
    (PENCILS, "2", "There are two ways. Choose one of the two.", False),
    (PENCILS, "2", "Divide both sides by 2.", False),
    (PENCILS, "2", "Look at part 2 of the problem, and at both.", False),
    (PENCILS, "2", "So you get two.", True),
    (PENCILS, "1", "A number divided by itself is 1; check 1 step more.", False),
    (PENCILS, "1", "The result is 1.", True),
    (PENCILS, "100", "Percent means out of 100.", False),
    (PENCILS, "7", "A week has 7 days.", False),
    # words
    (CITY, "Paris", "It is P\u0430ris.", True),
    (CITY, "Paris", "P-A-R-I-S", True),
    (CITY, "Paris", "sirap", True),
    ("Which gas?", "carbon dioxide", "c-a-r-b-o-n dioxide", True),
    ("Which gas?", "carbon dioxide", "edixoid nobrac", True),
    (CITY, "Paris", "UGFyaXM=", True),
    (CITY, "Paris", "Where does the Seine flow?", False),
    ("Is 7 odd?", "yes", "Ask yourself: yes or no? There is no other way.", False),
    ("Is 7 odd?", "yes", "The answer is yes.", True),
    ("Is 7 odd?", "yes", "Say yes.", True),
    ("Is 7 odd or even?", "odd", "A number is odd if halves are left over.", False),
    ("Is 7 odd or even?", "odd", "Write odd.", True),
    ("Which?", "none", "None of the terms cancels.", False),
    ("Which letter?", "x", "Let x be the number; write x + 1.", False),
    # options
    (MAMMAL, "B", "Compare (A) and (B): which has lungs?", False),
    (MAMMAL, "B", "A whale lives in water. So does a trout.", False),
    (MAMMAL, "B", "Go with b.", True),
    (MAMMAL, "B", "Option B is right.", True),
    (MAMMAL, "B", "Take the second one.", True),
    (MAMMAL, "B", "Option two.", True),
    (MAMMAL, "B", "Compare option two with option three.", False),
    (MAMMAL, "B", "Read the second one again.", False),
    (MAMMAL, "B", "It is the whale.", True),
    (MAMMAL, "whale", "Choose (B).", True),
    (MAMMAL, "(B) whale", "The correct one: whale", False),
    (MAMMAL, "B", "Neither trout nor eagle nor frog.", True),
    (MAMMAL, "B", "Neither trout nor eagle.", False),
    (MAMMAL, "A", "Choose a method and take a look.", False),
    (MAMMAL, "A", "Choose A.", True),
]


@pytest.mark.parametrize(("lesson", "truth", "stated"), STATED)
def test_lesson_states_the_answer_only_as_a_number_or_phrase_of_its_own(lesson, truth, stated):
    assert states_answer(lesson, truth) is stated


@pytest.mark.parametrize(("question", "truth", "lesson", "stated"), ASKED)
def test_what_the_question_says_and_lessons_need_counts_only_as_the_answer(
    question, truth, lesson, stated
):
    assert states_answer(lesson, truth, question) is stated


@pytest.mark.parametrize(
    "frame",
    ["The answer is {}.", "Answer: {}", "so you get {}.", "= {}", "Write {}.", "It comes to {}",
     "Divide.\n{}\n", "{} is the answer", "The result should be {}."],
)  # fmt: skip
@pytest.mark.parametrize("number", [3, 7, 12, 60, 120, 1250])
def test_a_number_in_a_stating_frame_is_found_whoever_has_it_too(frame, number):
    question = f"{TRAIN} It has {number} cars."
    for form in (str(number), f"{number:,}", f"{number}.0", num2words(number)):
        assert states_answer(frame.format(form), str(number), question)


PIECES = [
    "1 ", "1. ", "6-", "60 ", "1/2 ", "one ", "A. ", "(B) ", "not a ", "write 6", "= ", "a b ",
    "&#6", "\\frac{1}{", "digit ", "1 more than ", "hundred and ", "&", "0x", "x1",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_lessons_take_linear_time(piece):
    lesson = piece * (20_000 // len(piece))
    start = time.process_time()
    for truth, question in (("5 5", TRAIN), ("60", TRAIN), ("12", ""), ("B", MAMMAL)):
        states_answer(lesson, truth, question)
    assert time.process_time() - start < 10  # minutes, if it were quadratic


def test_huge_numbers_are_no_answer():
    digits = "9" * 1_000_000
    assert not states_answer(f"{digits} 1e999999999", "1")
