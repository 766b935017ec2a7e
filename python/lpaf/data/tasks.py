"""The tasks: GLUE, SQuAD and summarisation by the Hub's names, tasks for your own files, and the docstrings task."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

CLASSIFICATION = "classification"
REGRESSION = "regression"
QUESTION_ANSWERING = "question-answering"
SUMMARIZATION = "summarization"
#: causal: every token from those before it
LANGUAGE_MODELING = "language-modeling"
#: words that are hidden, from those on both sides
MASKED_LANGUAGE_MODELING = "masked-language-modeling"
#: problems whose examples are blocks of running text
RUNNING_TEXT_PROBLEMS = (LANGUAGE_MODELING, MASKED_LANGUAGE_MODELING)
#: problems whose labels are tokens, out of the model's vocabulary
TOKEN_PROBLEMS = (SUMMARIZATION, *RUNNING_TEXT_PROBLEMS)
PROBLEMS = (CLASSIFICATION, REGRESSION, QUESTION_ANSWERING, *TOKEN_PROBLEMS)
METRICS = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "exact_match")
METRICS += ("rouge1", "rouge2", "rougeL", "perplexity")
#: metrics of which less is better
LOWER_IS_BETTER = frozenset({"perplexity"})

# What the columns of a file may be called when the task does not fix it, in the order in which they are
# looked for.
FREE_TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"))
FREE_SUMMARY_COLUMNS = (
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("source", "target"),
)


@dataclass(frozen=True)
class TaskSpec:
    """What a task's examples look like and how predictions are scored.

    Args:
        name: the name that ``--task`` takes.
        text_columns: the choices of text columns, each a tuple of one (single text) or two (pair; text and
            summary) column names; the first choice whose columns are all in the file is used.
        problem: out of ``PROBLEMS``.
        metrics: names out of ``METRICS``, in the order in which they are shown.
        main_metric: the one that stands for the task, out of ``metrics``.
        labels: class names in the order of their integer labels on the Hub, or None when the data decide (and
            for the other problems).
        label_column: column of the label; the token problems have none. Default: "label".
        validation_splits: names of the validation splits; the first is the main one.
        hub: (repository, configuration) of ``datasets.load_dataset``, or None for tasks without one.
        unanswerable: whether a question may have no answer. Default: False.

    Raises:
        ValueError: an unknown problem or metric, a main metric outside ``metrics``, or no text columns.
    """

    name: str
    text_columns: tuple[tuple[str, ...], ...]
    problem: str
    metrics: tuple[str, ...]
    main_metric: str
    labels: tuple[str, ...] | None = None
    label_column: str = "label"
    validation_splits: tuple[str, ...] = ("validation",)
    hub: tuple[str, str] | None = None
    unanswerable: bool = False

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem={self.problem!r}: expected one of {PROBLEMS}")
        if not self.text_columns or any(len(choice) not in (1, 2) for choice in self.text_columns):
            raise ValueError(f"text_columns={self.text_columns!r}: expected choices of one or two column names")
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics={self.metrics!r}: unknown {unknown[0]!r}; expected names out of {METRICS}")
        if self.main_metric not in self.metrics:
            raise ValueError(f"main_metric={self.main_metric!r}: expected one of metrics={self.metrics!r}")
        if not self.validation_splits:
            raise ValueError("validation_splits=(): expected at least one name")

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return self.problem == REGRESSION

    @property
    def is_question_answering(self) -> bool:
        """Whether the label is a span of the context."""
        return self.problem == QUESTION_ANSWERING

    @property
    def is_summarization(self) -> bool:
        """Whether the answer is a text that the model writes."""
        return self.problem == SUMMARIZATION

    @property
    def is_language_modeling(self) -> bool:
        """Whether the label of every token is the next one."""
        return self.problem == LANGUAGE_MODELING

    @property
    def is_masked_language_modeling(self) -> bool:
        """Whether the labels are the tokens of words that are hidden."""
        return self.problem == MASKED_LANGUAGE_MODELING

    @property
    def is_running_text(self) -> bool:
        """Whether the examples are blocks of running text."""
        return self.problem in RUNNING_TEXT_PROBLEMS

    @property
    def predicts_tokens(self) -> bool:
        """Whether the labels are tokens."""
        return self.problem in TOKEN_PROBLEMS

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the main metric is better."""
        return self.main_metric in LOWER_IS_BETTER

    @property
    def max_length(self) -> int:
        """Tokens per example when ``--max-length`` is silent.

        Masked language modelling has 128, the length at which BERT trains for nine tenths of its steps (Devlin et al.,
        2019, appendix A.2): words are told by their neighbours, and longer blocks cost more than they tell.
        """
        if self.is_summarization or self.is_language_modeling:
            return 512
        return 384 if self.is_question_answering else 128


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...] = ("accuracy",),
    validation_splits: tuple[str, ...] = ("validation",),
) -> TaskSpec:
    return TaskSpec(
        name=name,
        text_columns=(columns,),
        problem=REGRESSION if labels is None else CLASSIFICATION,
        metrics=metrics,
        main_metric=metrics[0],
        labels=labels,
        validation_splits=validation_splits,
        hub=("nyu-mll/glue", name),
    )


def _questions(name: str, hub: tuple[str, str] | None = None, unanswerable: bool = False) -> TaskSpec:
    return TaskSpec(
        name=name,
        text_columns=(("question", "context"),),
        problem=QUESTION_ANSWERING,
        metrics=("exact_match", "f1"),
        main_metric="f1",
        label_column="answers",
        hub=hub,
        unanswerable=unanswerable,
    )


def _summaries(name: str, *columns: tuple[str, str], hub: tuple[str, str] | None = None) -> TaskSpec:
    # rouge2 stands for the task: frequent words in any order already score in rouge1 and rougeL, word pairs do not
    return TaskSpec(name, columns, SUMMARIZATION, ("rouge1", "rouge2", "rougeL"), "rouge2", hub=hub)


def _running_text(name: str, problem: str) -> TaskSpec:
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    return TaskSpec(name, (("text",),), problem, ("perplexity",), "perplexity", hub=wikitext)


_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, TaskSpec] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        _glue("sst2", ("sentence",), ("negative", "positive")),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        _glue("stsb", _PAIR, None, ("pearson", "spearmanr")),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        _glue("rte", _PAIR, ("entailment", "not_entailment")),
        _glue("wnli", _PAIR, ("not_entailment", "entailment")),
        _questions("squad", hub=("rajpurkar/squad", "plain_text")),
        _questions("squad_v2", hub=("rajpurkar/squad_v2", "squad_v2"), unanswerable=True),
        _summaries("cnn_dailymail", ("article", "highlights"), hub=("abisee/cnn_dailymail", "3.0.0")),
        _summaries("xsum", ("document", "summary"), hub=("EdinburghNLP/xsum", "default")),
        _summaries("summarization", *FREE_SUMMARY_COLUMNS),
        _running_text("language-modeling", LANGUAGE_MODELING),
        _running_text("mlm", MASKED_LANGUAGE_MODELING),
        TaskSpec("text-classification", FREE_TEXT_COLUMNS, CLASSIFICATION, ("accuracy", "f1"), "accuracy"),
        TaskSpec("text-regression", FREE_TEXT_COLUMNS, REGRESSION, ("pearson", "spearmanr"), "pearson"),
        _questions("question-answering"),
        TaskSpec("docstrings", (("text",),), CLASSIFICATION, ("accuracy", "f1"), "accuracy"),
    )
}


def get_task(name: str) -> TaskSpec:
    """The task called ``name``.

    Raises:
        InputError: no task has that name; the message lists those that exist.
    """
    if name not in TASKS:
        raise InputError(f"--task {name}: no such task; choose one of {', '.join(TASKS)}")
    return TASKS[name]
