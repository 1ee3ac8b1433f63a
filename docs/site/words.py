"""The words of generated parts, in both languages."""

from __future__ import annotations

LANGUAGES = ("en", "zh")

# The sections that a page of a loss has in its source, by key.
HEADINGS = {
    "en": {
        "use": "When to use it",
        "not": "When not",
        "example": "Example",
        "pitfalls": "Pitfalls",
    },
    "zh": {
        "use": "何时使用",
        "not": "何时不用",
        "formula": "公式",
        "parameters": "参数",
        "example": "示例",
        "pitfalls": "常见的坑",
    },
}
WORDS = {
    "en": {
        "formula": "Formula",
        "value": "value",
        "slope": "gradient",
        "parameters": "Parameters",
        "columns": "parameter | type | default | shape | meaning",
        "required": "required",
        "ours": "not PyTorch's",
        "legacy": "`size_average` and `reduce`, deprecated, override `reduction` as in PyTorch.",
        "returns": "Returns: ",
        "errors": "Errors",
        "strict": 'Under `fusedloss.checks("strict")` also refused, with a `ValueError`: ',
        "numerics": "Numerics",
        "digits": "The greatest errors that `fusedloss verify --only {name}` found against 50 digits, in "
        "[ulps](../accuracy.md#what-an-error-of-1-ulp-is); ∞ is NaN or inf where a number is right; "
        "* adds what float32 is allowed to the half ulp of the one rounding.",
        "digits_columns": "type | value: ours | allowed | PyTorch | gradient: ours | allowed | PyTorch",
        "speed": "Speed",
        "times": "Forward and backward, medians, as `fusedloss bench --only {name} --no-sweep` prints them; the "
        "machines are shared, so the ratios mean more than the times. Memory is what a call needs beyond its "
        "inputs and gradients.",
        "times_columns": "case | ours | PyTorch / ours | torch.compile / ours | MB: ours | PyTorch",
        "heads": "Forward and backward in float32, rows x features x classes, as `fusedloss bench --linear --quick` "
        "prints them. Memory is what a call needs beside the gradients.",
        "heads_columns": "case | ours / three products alone | PyTorch / ours | MiB: ours | PyTorch",
        "raw": "Raw samples: ",
        "untimed": "`fusedloss bench` has no case of this loss that is kept in `benchmarks/results/`.",
        "undigitized": "`fusedloss verify --only {name}` measures it; docs/accuracy.md has no row of it yet.",
        "by": "It computes by [`{name}`]({name}.md): what stands there holds for each of its heads.",
        "related": "Related losses",
        "family": "Family: ",
        "module": "Module: ",
        "theirs": "PyTorch's page",
        "alone": "PyTorch has no function of this name",
        "reference": "Reference",
        "losses": "All losses",
        "losses_lead": "Every loss has a page: what it is for, its formula, parameters, a checked example, pitfalls, "
        "errors, digits and speed.",
        "losses_columns": "loss | module | what for",
        "start": "Start",
        "tutorials": "Tutorials",
        "by_family": "Losses",
        "more": "Reference",
        "other": "中文",
        "api": "API reference",
        "search": "Search",
    },
    "zh": {
        "formula": "公式",
        "value": "损失值",
        "slope": "梯度",
        "parameters": "参数",
        "columns": "参数 | 类型 | 默认值 | 形状 | 含义",
        "required": "必填",
        "ours": "PyTorch 没有",
        "legacy": "`size_average` 与 `reduce` 已弃用；与 PyTorch 一样，给出时会覆盖 `reduction`。",
        "errors": "报错",
        "strict": '在 `fusedloss.checks("strict")` 之下还会以 `ValueError` 拒绝：',
        "numerics": "数值精度",
        "digits": "`fusedloss verify --only {name}` 以 50 位有效数字为准测得的最大误差，单位为 "
        "[ulp](../accuracy.md#what-an-error-of-1-ulp-is)（末位单位）；∞ 表示本应是有限数却得到 NaN 或 inf；"
        "带 * 的界限是：唯一一次舍入的半个 ulp，再加上 float32 所允许的误差。",
        "digits_columns": "类型 | 损失值：我们 | 上限 | PyTorch | 梯度：我们 | 上限 | PyTorch",
        "speed": "速度",
        "times": "前向加反向的中位数，由 `fusedloss bench --only {name} --no-sweep` 打印；测量机器为共享机器，比值比时间更可信。"
        "内存指一次调用除输入与梯度之外还需要多少。",
        "times_columns": "用例 | 我们 | PyTorch / 我们 | torch.compile / 我们 | MB：我们 | PyTorch",
        "heads": "float32 的前向加反向，用例写作"
        "行数 x 特征数 x 类别数，由 `fusedloss bench --linear --quick` 打印。内存指除梯度之外还需要多少。",
        "heads_columns": "用例 | 我们 / 仅三次矩阵乘 | PyTorch / 我们 | MiB：我们 | PyTorch",
        "raw": "原始采样：",
        "untimed": "`benchmarks/results/` 中还没有这个损失的 `fusedloss bench` 记录。",
        "undigitized": "可用 `fusedloss verify --only {name}` 测量；docs/accuracy.md 中暂时还没有它的数据。",
        "by": "它由 [`{name}`]({name}.md) 计算：那一页的数据适用于它的每个输出层。",
        "related": "相关损失",
        "family": "类别：",
        "module": "模块：",
        "theirs": "PyTorch 对应页面",
        "alone": "PyTorch 没有同名函数",
        "reference": "API 参考",
        "losses": "全部损失",
        "losses_lead": "每个损失各有一页：用途、公式、参数、经过检验的示例、常见的坑、报错、数值精度与速度。",
        "losses_columns": "损失函数 | 模块 | 用途",
        "start": "入门",
        "tutorials": "教程",
        "by_family": "损失函数",
        "more": "参考",
        "other": "English",
        "api": "API 参考",
        "search": "搜索",
    },
}
FAMILIES = {
    "regression": ("Regression", "回归"),
    "classification": ("Classification", "分类"),
    "distributions": ("Matching distributions", "匹配分布"),
    "metric": ("Metric learning and ranking", "度量学习与排序"),
    "segmentation": ("Segmentation", "分割"),
    "sequences": ("Sequences", "序列"),
    "heads": ("Heads without logits", "不生成 logits 的输出层"),
}
SHAPES_ZH = {
    "any": "任意",
    "as input": "同 input",
    "as target": "同 target",
    "as the first": "同第一个张量",
    "broadcasts": "可广播",
}
# What the theme says, where Sphinx has no translation of it.
THEME_ZH = {
    "Home": "首页",
    "Previous": "上一页",
    "Next": "下一页",
    "On this page": "本页内容",
    "Back to top": "回到顶部",
}
# What a parameter means wherever its page does not say it.
COMMON_ZH = {
    "reduction": "归约方式：`'none'` 不归约，`'mean'` 取平均，`'sum'` 求和。",
    "denominator": "`'mean'` 的除数，代替自己的计数：一个数或 0 维张量，例如所有进程、所有累积步的总数"
    "（`fusedloss.distributed.count`）。",
}


def family(key: str, language: str) -> str:
    return FAMILIES[key][LANGUAGES.index(language)]
