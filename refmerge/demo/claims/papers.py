"""What the papers say, system by system, and which experiment shows whether it holds on eight small tasks.

`why` is a guess for where a claim does not hold; it appears on the page only there.
"""

from __future__ import annotations

from refmerge.demo.claims import adapters, alignment, averaging, data_driven, table, task_vectors
from refmerge.demo.claims.claim import Check, Claim

__all__ = ["CLAIMS"]

TABLE = "The table of methods."
SOUPS = "Eight fine-tunes on upright digits, of other rates, lengths and orders."
LINE = "A fine-tune on upright digits; shifted: the six other kinds of pictures, which the base has seen."
TWO = "Two networks of two layers of 64 units, trained apart."

CLOSE = "Between the two lies less than between one seed and the next."
NARROW = "Matrices of 128 rows have few directions for eight tasks to share out."

CLAIMS: dict[str, list[Claim]] = {
    "averaging": [
        Claim(
            "uniform_soup", "The average of fine-tunes is better than they are one by one, also under shift", SOUPS,
            averaging.soups,
            [Check("uniform soup", "members"), Check("uniform soup, shifted", "members, shifted")],
            "Members with a high rate forget so much that the average does too.",
        ),
        Claim(
            "uniform_soup", "It comes close to an ensemble of outputs at the cost of one model, and beats it under shift",
            SOUPS, averaging.soups,
            [Check("uniform soup", "ensemble", -1), Check("uniform soup, shifted", "ensemble, shifted")],
            "Members are near each other, so that average and ensemble answer almost alike.",
        ),
        Claim(
            "greedy_soup", "Is at least as good as the best single model", SOUPS + " Greedy on validation images.",
            averaging.soups, [Check("greedy soup", "best member", equal=True)],
            "With 200 validation images, which member is best and what is added is mostly luck.",
        ),
        Claim(
            "wise_ft", "Half way to the base: better under shift than the fine-tune by far, and nearly as good at its task",
            LINE, averaging.line, [Check("half way, shifted", "fine-tune, shifted"), Check("half way", "fine-tune", -2)],
            "A small network moves further, and the middle gives up more.",
        ),
        Claim(
            "bang", "With Mixup and smoothed labels the middle is better still under shift", LINE, averaging.line,
            [Check("half way, BANG, shifted", "half way, shifted")], "Mixed pictures of 8x8 pixels hardly look like digits.",
        ),
        Claim(
            "sparse_stragglers", "With the largest changes alone of the straggler layer the middle is better under shift",
            LINE + " The layer with the highest score, half of its changes.", averaging.line,
            [Check("half way, sparse, shifted", "half way, shifted")],
            "The half that goes is small, and changes little either way.",
        ),
        Claim(
            "model_ratatouille", "Fine-tunes that began at other tasks' fine-tunes average better under shift than a soup",
            "Four fine-tunes by way of turned, mirrored, noisy and shifted digits, and four straight from the base.",
            averaging.ratatouille, [Check("ratatouille, shifted", "soup, shifted")],
            "Auxiliary tasks turn the pictures, which the target task then has to unlearn.",
        ),
        Claim(
            "warm", "An average of models learns fewer of the wrong labels than their ensemble, and is better than they are",
            "Four fine-tunes on labels of which three in ten are wrong.", averaging.rewards,
            [
                Check("ensemble, wrong labels learned", "average, wrong labels learned"),
                Check("average", "members"),
            ],
            "Four models that began at one base make the same mistakes.",
        ),
        Claim(
            "salsa", "The average of two supervised fine-tunes as reference lets a policy reach a higher reward",
            "Gradient ascent on the expected reward with a KL penalty of 0.2.", averaging.anchored,
            [Check("soup as reference", "one reference")],
            "The reward says all that there is to know, so that the reference matters little.",
        ),
        Claim(
            "warp", "The spherical mean of two policies has more reward than either, and than the average",
            "Two policies with a moving average as anchor, merged with one angle a layer.", averaging.policies,
            [Check("slerp", "policies"), Check("slerp", "average")],
            "Task vectors of two runs on the same images are nearly parallel.",
        ),
        Claim(
            "liti", "The line from there back to the start gives more reward for the same KL than training does",
            "The same two policies after 2 to 6 epochs, against the line at their KL; reward above theirs, in per cent.",
            averaging.policies, [Check("front above policies", 0.0)], "Two policies are few.",
        ),
        Claim(
            "diffusion_soup", "A shard of the data is forgotten when its model is taken out of the average, the rest stays",
            "Five shards of two digits each.", averaging.shards,
            [
                Check("digits 8 and 9", "digits 8 and 9, shard taken out", 10),
                Check("others, shard taken out", "others", -1),
            ],
            "Each model still has what the base knew.",
        ),
        Claim(
            "diffusion_soup", "The average of shards' models is better than one model trained on all shards",
            "Four shards of digits at random.", averaging.shards, [Check("soup of shards", "one model on all")],
            "A quarter of 999 images is too little for a fine-tune.",
        ),
        Claim(
            "pareto", "Trained together, one line of weights holds models for all preferences between two tasks",
            "Turned and mirrored digits, 150 steps.", averaging.front,
            [
                Check("mean in the middle", "mean in the middle, trained apart"),
                Check("turned, at its end", "turned, at the other end"),
            ],
            "Both tasks fit into the network at once, so that there is little to trade.",
        ),
        Claim(
            "time_vectors", "Between two times the middle of their models is better than either",
            "Digits that lean by 0, 20 and 40 degrees.", averaging.times,
            [Check("between", "early"), Check("between", "late")],
            "Fine-tuned at 40 degrees a model reads 20 too, and the upright fine-tune only takes away from that.",
        ),
        Claim(
            "time_vectors", "What one domain learned in time carries over to another by an analogy",
            "Thick digits that lean, from thick upright ones and thin ones of both times.", averaging.times,
            [Check("thick + late - early", "thick, early")], "The two changes interfere.",
        ),
        Claim(
            "weight_selection", "A small network that starts from a larger one's weights learns faster and ends higher",
            "Layers of 256 units, every fourth of them chosen; after 1 epoch and after 20.", averaging.selected,
            [Check("selected, 1 epoch", "new, 1 epoch"), Check("selected, 20 epochs", "new, 20 epochs")],
            "A quarter of the units, chosen by their place, computes little of what all of them do.",
        ),
        Claim(
            "greedy_soup", "Of models for different tasks a greedy soup is better than the uniform one",
            TABLE, table.best, [Check("greedy_soup", "linear")],
            "Each task needs its own fine-tune, so that hardly one can be left out.",
        ),
    ],
    "task_vectors": [
        Claim(
            "task_arithmetic", "Task vectors of different tasks are nearly orthogonal, and two added serve both tasks",
            "All pairs of tasks, lambda 0.5; per cent of the fine-tunes' accuracy.", task_vectors.arithmetic,
            [Check("pairs, of the fine-tunes", 90.0), Check(0.1, "cosine of task vectors")],
            "Tasks that turn the picture ask for other answers to the same pixels.",
        ),
        Claim(
            "task_arithmetic", "All added, one model serves all tasks better than the base or the average",
            TABLE, table.best, [Check("task_arithmetic", "base"), Check("task_arithmetic", "linear")],
            "With eight tasks the best lambda is not far from the average's 1/8.",
        ),
        Claim(
            "negation", "Taken away, a task is forgotten, and others stay", "The task of the digits 5 to 9.",
            task_vectors.arithmetic,
            [Check("base, 5 to 9", "negated, 5 to 9", 10), Check("negated, 0 to 4", "base, 0 to 4", -2)],
            "The tasks share units.",
        ),
        Claim(
            "analogy", "A task of which there are no data is learned by an analogy of three others",
            "Noisy 5 to 9, from clean 5 to 9, noisy 0 to 4 and clean 0 to 4.", task_vectors.arithmetic,
            [Check("analogy", "clean 5 to 9")],
            "What a fine-tune learns about noise it learns for its own digits, and it forgets the others on the way.",
        ),
        Claim(
            "ties", "Is better than task arithmetic", TABLE, table.best, [Check("ties", "task_arithmetic")],
            CLOSE,
        ),
        Claim(
            "dare_linear", "Nine tenths of a fine-tune's change can be dropped at random if the rest is enlarged",
            "Each fine-tune by itself.", task_vectors.dropped,
            [Check("90 % dropped", "fine-tunes", -1), Check("90 % dropped", "90 % dropped, not rescaled")],
            "A unit here sums 128 inputs, not thousands, and the noise of the draw does not average out.",
        ),
        Claim(
            "dare_ties", "DARE helps what it is put before", TABLE, table.best, [Check("dare_ties", "ties")],
            "What the draw leaves of small networks is noisy.",
        ),
        Claim(
            "breadcrumbs", "Dropping outliers and small entries is better than task arithmetic", TABLE, table.best,
            [Check("breadcrumbs", "task_arithmetic")],
            "gamma 0.006 of a row of 128 is no entry at all, so that only the trim is left.",
        ),
        Claim(
            "della", "Dropping small entries sooner than large ones is better than DARE", TABLE, table.best,
            [Check("della", "dare_ties")], CLOSE,
        ),
        Claim(
            "model_stock", "Two fine-tunes are enough to be as good as a soup of many",
            SOUPS + " The stock of two of middling rates.", averaging.soups,
            [Check("stock of two", "uniform soup", -1), Check("stock of two, shifted", "uniform soup, shifted")],
            "Fine-tunes of small networks are at smaller angles than the paper's.",
        ),
        Claim(
            "widen", "Merges a model that changed a lot with one that changed little, where others lose one of them",
            "Two epochs on upright digits, thirty on turned ones at four times the rate; the mean of both tasks.",
            task_vectors.sizes, [Check("widen", "task_arithmetic"), Check("widen", "ties"), Check("widen", "average")],
            "Weights for models and calibrated scores add up to more than 1, which is too far for a network of this size.",
        ),
        Claim(
            "sce", "Is better than averaging", TABLE, table.best, [Check("sce", "linear")],
            "It keeps a tenth of the entries with no factor to make up for the rest.",
        ),
        Claim(
            "ram", "Entries that one model alone changed should not be diluted: better than averaging", TABLE, table.best,
            [Check("ram", "linear"), Check("ramplus_tl", "linear")],
            "Dense fine-tunes change every entry, so that there is nothing that one model alone changed.",
        ),
        Claim(
            "tall_masks", "The mask of a task brings nearly all of its fine-tune's accuracy back, above 99 per cent",
            "Per cent of the fine-tunes' accuracy.", task_vectors.masks, [Check("tall_masks, of the fine-tunes", 99.0)],
            "Small networks have fewer entries that only one task uses.",
        ),
        Claim(
            "tall_masks", "Eight models in a fraction of their bytes", "A store of eight tasks in float32, times smaller.",
            task_vectors.stored, [Check("times smaller, tall_masks", 3.0)],
        ),
        Claim(
            "consensus", "Without what no task or one alone uses, the sum is better than task arithmetic", TABLE, table.best,
            [Check("consensus", "task_arithmetic")],
            CLOSE,
        ),
        Claim(
            "rws", "A robust model's signature, patched in, makes a clean model robust, and goes out again",
            "Clean: upright digits; robust: upright and noisy ones.", task_vectors.robust,
            [
                Check("patched, noisy", "clean model, noisy", 2),
                Check("patched", "clean model", -1),
                Check("patched, noisy", "taken out, noisy"),
            ],
            "The two models differ by more than robustness.",
        ),
        Claim(
            "emr", "Without training, nearly as good as the fine-tunes, and far above merges",
            "A model for each task; TIES as one model.", task_vectors.masks,
            [Check("emr", "fine-tunes", -3), Check("emr", "ties", 5)],
            "Eight tasks elect one sign for each entry, and small networks have few to spare.",
        ),
        Claim(
            "pcb", "Competition within and between task vectors is better than TIES", TABLE, table.best,
            [Check("pcb", "ties")], CLOSE,
        ),
        Claim(
            "lines", "Scaled down in the first blocks, a fine-tune forgets less and is nearly as good at its task",
            "Upright digits; 0.3 in the first of two blocks.", task_vectors.scaled,
            [Check("lines, shifted", "fine-tune, shifted"), Check("lines", "fine-tune", -2)],
            "Two blocks are few.",
        ),
        Claim(
            "lines", "Is better than task arithmetic when tasks are added", TABLE, table.best,
            [Check("lines", "task_arithmetic")],
            "Pictures that are turned need another first layer, so that it is the last one that is shared here.",
        ),
        Claim(
            "magmax", "Of tasks learned one after another the largest changes keep more than the last model or the average",
            "The eight tasks in their order.", task_vectors.sequence,
            [
                Check("magmax of the sequence", "last of the sequence"),
                Check("magmax of the sequence", "average of the sequence"),
                Check("magmax of the sequence", "magmax, trained apart"),
            ],
            "Eight short fine-tunes forget little.",
        ),
        Claim(
            "expo", "A step beyond an aligned model is better than the model",
            "A supervised fine-tune, an epoch of reinforcement, alpha 0.3.", task_vectors.beyond,
            [Check("extrapolated", "aligned")], "One epoch may be enough already.",
        ),
        Claim(
            "bitdelta", "A fine-tune's change is worth one bit: more than ten times smaller, and nearly as good",
            "Each fine-tune by itself, scales not trained.", task_vectors.stored,
            [Check("times smaller, bitdelta", 10.0), Check("bitdelta", "fine-tunes", -2)],
            "One scale a matrix makes small changes as large as the others; the paper trains the scales.",
        ),
        Claim(
            "cart", "Low rank around the average is better than task arithmetic", TABLE, table.best,
            [Check("cart", "task_arithmetic")], CLOSE,
        ),
        Claim(
            "twin_merging", "With the remainders of a task on top, the shared model is nearly as good as the fine-tunes",
            TABLE + " The router knows the task.", table.best,
            [
                Check("twin_merging", "task_arithmetic", 5),
                Check("twin_merging", "each task's fine-tune", -2),
            ],
            "A tenth of 64 ranks is little.",
        ),
    ],
    "subspaces": [
        Claim(
            "low_rank_residual", "What fine-tuning changed has a low rank", "Rank 8 of up to 128.", task_vectors.stored,
            [Check("rank 8", "fine-tunes", -1)], "A small network uses all its directions.",
        ),
        Claim(
            "tsvm", "Is better than TIES and task arithmetic by far", TABLE, table.best,
            [Check("tsvm", "ties"), Check("tsvm", "task_arithmetic")], NARROW,
        ),
        Claim(
            "iso_c", "Equal singular values are better than TIES by far, and no worse than TSV-Merge", TABLE, table.best,
            [Check("iso_c", "ties"), Check("iso_c", "tsvm", -1)], NARROW,
        ),
        Claim(
            "iso_cts", "Directions of the tasks beside common ones are no worse for eight tasks", TABLE, table.best,
            [Check("iso_cts", "iso_c", -1)], NARROW,
        ),
        Claim(
            "dc_merge", "Is better than Iso-C", TABLE, table.best, [Check("dc_merge", "iso_c")], NARROW,
        ),
        Claim(
            "wudi", "Without data, interference made small is better than TIES by far", TABLE, table.best,
            [Check("wudi, exact", "ties")],
            "Its sum has no scale to choose, and sums of eight whole task vectors are too long here.",
        ),
        Claim(
            "doge", "Gradients in a shared subspace are better than task arithmetic", TABLE, table.best,
            [Check("doge", "task_arithmetic")], "Its lambda of 0.07 and its rate are made for large transformers.",
        ),
        Claim(
            "opcm", "Projections let models come one after another and be better than averaging", TABLE, table.best,
            [Check("opcm", "linear")],
            "What is orthogonal to the models before keeps little of a task where directions are few.",
        ),
        Claim(
            "knots", "Adapters merge better in directions that they share", "Adapters of rank 8, scales on validation data.",
            adapters.spaces, [Check("knots", "ties")], "Adapters of rank 8 have few directions in common.",
        ),
        Claim(
            "core_space", "Merged in the small space of their factors, adapters are no worse than as whole matrices",
            "TSV-Merge in both.", adapters.spaces, [Check("core_space with tsvm", "tsvm", -0.5)],
            "Cores are small and full.",
        ),
    ],
    "data_driven": [
        Claim(
            "fisher", "Weighted by Fisher information, an average is better than without", TABLE, table.best,
            [Check("fisher", "linear")], "Information is taken at the fine-tunes, far from where they meet.",
        ),
        Claim(
            "regmean", "Least squares of the layers' outputs are better than averages, Fisher's too", TABLE, table.best,
            [Check("regmean", "linear"), Check("regmean", "fisher")], "Layers are few.",
        ),
        Claim(
            "regmean_plusplus", "Inputs as the merged layers before make them are better than RegMean", TABLE, table.best,
            [Check("regmean_plusplus", "regmean")], "Two layers are too few for errors to add up.",
        ),
        Claim(
            "mats", "Matching in task subspaces is better than RegMean and Fisher", TABLE, table.best,
            [Check("mats", "regmean"), Check("mats", "fisher")], "Curvature of small fine-tunes is far from constant.",
        ),
        Claim(
            "adamerging", "Coefficients that make predictions sure are better than task arithmetic, layer by layer most",
            TABLE, table.best,
            [
                Check("adamerging, layer-wise", "adamerging, task-wise"),
                Check("adamerging, task-wise", "task_arithmetic"),
            ],
            "The entropy does fall, by larger coefficients; but where tasks share outputs, sure is not right.",
        ),
        Claim(
            "adamerging", "The same, where each task has outputs of its own", "Ten for each task, 500 steps from 0.3.",
            data_driven.own_outputs,
            [Check("layer-wise", "task-wise"), Check("task-wise", "task_arithmetic")],
            "It costs less than where outputs are shared, but sure is not right here either.",
            also=["average", "layer-wise, entropy falls by"],
        ),
        Claim(
            "adamerging", "Trimmed first, as AdaMerging++, better still", TABLE, table.best,
            [Check("adamerging++, layer-wise", "adamerging, layer-wise")],
            "The entropy misleads both.",
        ),
        Claim(
            "model_tinting", "Each task's own last layer, trained on the fine-tunes' labels, beats AdaMerging and RegMean",
            TABLE, table.best,
            [Check("model_tinting", "adamerging, layer-wise"), Check("model_tinting", "regmean")],
            "Last layers are small.",
        ),
        Claim(
            "atlas", "With labels, a coefficient for each tensor and task is better than one for all", TABLE, table.best,
            [Check("atlas", "task_arithmetic")], "Twenty-four coefficients are few.",
        ),
        Claim(
            "evolutionary_merge", "A search over coefficients is better than one chosen from a grid", TABLE, table.best,
            [Check("evolutionary_merge", "task_arithmetic")],
            "A hundred trials find what is good on 200 images.",
        ),
    ],
    "alignment": [
        Claim(
            "git_rebasin", "Matched units take the barrier between two networks away", TWO, alignment.pairs,
            [Check("barrier", "barrier, matched by weights", 0.2)], "64 units are few.",
        ),
        Claim(
            "git_rebasin", "Matched activations do so too", TWO, alignment.pairs,
            [Check("barrier", "barrier, matched by activations", 0.2)], "64 units are few.",
        ),
        Claim(
            "repair", "Statistics given back make the matched average better", TWO, alignment.pairs,
            [Check("loss, matched", "loss, matched and repaired")], "Two layers have little to repair.",
        ),
        Claim(
            "ws_mixup", "Mixed after matching, two networks give one that still works", TWO, alignment.pairs,
            [Check("loss, mixed", "loss, mixed after matching", 0.2)], "64 units are few.",
        ),
        Claim(
            "layerwise_barrier", "No layer by itself has a barrier between two networks that began alike",
            "One initialisation, other halves of the images. Here all layers together have none either.", alignment.halves,
            [Check(0.05, "largest barrier of a layer")],
            "Other halves lead away from each other.", also=["barrier of the network"],
        ),
        Claim(
            "symmetry", "A permutation of units changes nothing that a network says",
            "Minus the logarithm of the largest change.", alignment.symmetric, [Check("-log10 of the change", 12.0)],
        ),
        Claim(
            "zipit", "Networks for different tasks merge better if features inside of one may merge too",
            "Digits 0 to 4 and 5 to 9, layers of 64 units, right of ten.", alignment.zipped,
            [Check("zipped", "permuted by activations"), Check("zipped", "average")],
            "There are no batch norms to set anew, and the defaults hold back merges inside of a network.",
        ),
        Claim(
            "pleas", "Layers fitted to both networks beat their average, and wider ones come nearer to both", TWO,
            alignment.widened,
            [Check("1 times as wide", "not fitted"), Check("2 times as wide", "1 times as wide", equal=True)],
            "The narrow one is as good as its parents already.",
        ),
        Claim(
            "otfusion", "Networks of other widths fuse into one that works without training, unlike an average",
            "Layers of 128 units into layers of 64.", alignment.transported, [Check("fused", "averaged")],
            "Transport is one to one in part.",
        ),
        Claim(
            "otfusion", "Trained on, it is better than its parent trained on", "The same.", alignment.transported,
            [Check("fused, trained on", "parent, trained on")], "Parents have learned all that there is.",
        ),
        Claim(
            "clafusion", "Networks of other depths fuse, better than averaged layer by layer",
            "Four hidden layers and two, merged.", alignment.of_depths, [Check("fused", "averaged")], "Depths are small.",
        ),
        Claim(
            "convergent_matching", "Trained apart, networks learn units that are alike",
            "The second of four hidden layers; mean correlation.", alignment.alike,
            [Check("correlation of matched units", "with a network that was not trained", 0.05)], "Pixels are few.",
        ),
        Claim(
            "cka", "Finds which layers of two networks correspond", "Four hidden layers; per cent of them.", alignment.alike,
            [Check("layers found", "by chance", 25)], "On an easy task neighbouring layers hold the same.",
        ),
        Claim(
            "soft_trees", "Trees matched up to their flips have a lower barrier than trees matched alone",
            "Sixteen soft trees of four leaves, trained apart, matched by what they answer.", alignment.forests,
            [
                Check("barrier", "barrier, trees matched and flipped"),
                Check("barrier, trees matched", "barrier, trees matched and flipped"),
            ],
            "Sixteen trees are few: papers' barriers vanish as trees become many.",
        ),
    ],
    "adapters": [
        Claim(
            "pem", "Adapters of two parts of the data, added, are better than each", "Halves of upright digits, rank 8.",
            adapters.arithmetic, [Check("added", "halves")], "Each half is enough to learn the task.",
        ),
        Claim(
            "pem", "Negated, an adapter makes its task forgotten, and others stay", "Digits 5 to 9.", adapters.arithmetic,
            [Check("base, 5 to 9", "negated, 5 to 9", 10), Check("negated, 0 to 4", "base, 0 to 4", -2)],
            "Adapters of all layers reach all digits.",
        ),
        Claim(
            "pem", "Carries a domain over by an analogy", "Noisy 5 to 9, from three others.", adapters.arithmetic,
            [Check("analogy", "clean 5 to 9")], "As with task vectors: noise is learned for the digits that are there.",
        ),
        Claim(
            "lora_merge", "The average of adapters, cut back to the rank of one, loses little", "Eight adapters of rank 8.",
            adapters.merged, [Check("average at rank 8", "average", -1)], "Eight tasks have little in common.",
        ),
        Claim(
            "loraclr", "Concepts that are told apart merge better than by averaging", "Eight adapters of rank 8.",
            adapters.merged, [Check("loraclr", "average")],
            "Fifty steps at the rate 0.0001 hardly leave the start; the paper's layers are far larger.",
        ),
        Claim(
            "lora_extraction", "A fine-tune is an adapter of low rank, nearly", "Rank 8 of up to 128.", adapters.merged,
            [Check("extracted at rank 8", "fine-tunes", -1)], "A small network uses all its directions.",
        ),
        Claim(
            "ensemble_predict", "An ensemble of adapters is more accurate and better calibrated than one of them",
            "Five adapters on 300 images.", adapters.asked,
            [
                Check("ensemble, right", "members, right"),
                Check("ensemble, log-likelihood", "members, log-likelihood"),
                Check("members, calibration error", "ensemble, calibration error"),
            ],
            "Members are not too sure to begin with, and their mean is less sure than it is right.",
        ),
    ],
    "experts": [
        Claim(
            "smile", "Without data or training inputs find their experts: far above merges, near to the fine-tunes",
            TABLE, table.best,
            [Check("smile, wide gates", "task_arithmetic", 5), Check("smile, wide gates", "each task's fine-tune", -5)],
            "Pictures of the same digits, turned or shifted, look alike to a layer that reads pixels.",
        ),
    ],
}  # fmt: skip
