"""The goals of advice, and where its published figures come from. Those of multum's own benchmarks are kept in its repository."""

SMALLER, FASTER, BOTH, PRIVATE, UNTRAINED = "smaller", "faster", "both", "private", "no-training"
GOALS = {
    SMALLER: "fewer bytes",
    FASTER: "less time for a text",
    BOTH: "fewer bytes and less time",
    PRIVATE: "fewer bytes and less time, without training on the texts once more and without a list of their words in what ships",
    UNTRAINED: "smaller and faster without training it again, in minutes",
}

KWON = (
    "Kwon et al. 2022, arXiv:2204.09656: BERT-base and DistilBERT, up to 2.0x fewer FLOPs and 1.56x faster on a GPU, under 1 % lost"
)
SAJJAD = "Sajjad et al. 2020, arXiv:2004.03844: GLUE, BERT and others"
DISTILBART = "Shleifer and Rush 2020, arXiv:2010.13002, model card: 12-6, 1.68x on XSum and 1.24x on CNN/DailyMail"
DISTILBERT = "Sanh et al. 2019, arXiv:1910.01108: DistilBERT against BERT-base, GLUE dev macro score"
WANDA = "Sun et al. 2023, arXiv:2306.11695: perplexity on WikiText-2, half of the weights zero"
MOVEMENT = "Sanh et al. 2020, arXiv:2005.07683: with distillation"
SPARSE = "Neural Magic, DeepSparse docs: BERT-base with 90 % zeros in int8, ONNX Runtime 55.2 texts/s against 64.3 dense in fp32"
INT8 = (
    "Intel Neural Compressor, validated models: ONNX Runtime 1.18.1, dynamic int8 over fp32, Xeon 8480+; MiniLM 12x384 2.23x, "
    "MiniLM 6x384 2.09x, BERT-mini 1.86x, BERT-base 3.36x, DistilBERT 2.92x and 3.46x"
)
LEAK = "Jagielski et al. 2023 (NeurIPS)"
ONE_SHOT = "benchmarks/results/one_shot.md: MiniLM, film reviews, medians of three seeds"
OWN = "benchmarks/results/reviews_quick.md: MiniLM, film reviews, on two cores"
