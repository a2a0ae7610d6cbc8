package org.gemmaedge.core

import kotlin.coroutines.cancellation.CancellationException
import kotlin.math.abs
import kotlin.math.sqrt

/** One figure of a check. Without a [limit] it is information, and always passes. */
class Row(
    val id: String,
    val name: String,
    val metric: String,
    val value: Double,
    val limit: Double?,
    val passed: Boolean,
)

/**
 * The figures against [reference], the first of the artifact's references whose limits all hold.
 *
 * If there is no such reference, [reference] is null, and the figures are those against the artifact's first one.
 */
class SelfCheckResult(val reference: String?, val rows: List<Row>, val passed: Boolean)

/**
 * Proves on this device that the graph of [format], run by [engine], is the model that the bundle says it is.
 *
 * Replays every walk of `proof/plan.json` and compares with the golden vectors, as `gemma-edge validate` does: the same
 * figures, ids and limits. Kernels of different processors round activations in different ways, so it is enough that
 * the limits of one of the artifact's references hold. [Bundle.verify] compares the sha256 of the files; call it first.
 * Two of Python's checks are left out: the single steps of a .pte, which need the eager model, and the comparison of
 * the references with those that the manifest's weights need.
 */
class SelfCheck(private val bundle: Bundle, private val format: String, private val engine: Engine) {
    private val manifest = bundle.manifest

    /**
     * Takes as long as feeding the plan's sequence five times, and memory for the logits after each call of one walk.
     *
     * [cancelled] is asked before each call; then this throws [CancellationException]. [progress] counts calls. Throws
     * [VerificationFailed] when the proof itself is damaged, or does not belong to the bundle.
     */
    fun run(
        cancelled: () -> Boolean = { false },
        progress: (done: Long, total: Long) -> Unit = { _, _ -> },
    ): SelfCheckResult {
        val artifact = bundle.artifact(format)
        for (name in listOf(ProofPlan.FILE, Reference.FILE)) {
            if (name !in manifest.files) {
                throw VerificationFailed("$name: is not among the bundle's files; export the bundle again")
            }
        }
        val proof = ProofPlan.read(bundle)
        val golden = Reference.readAll(bundle)
        val judges = judges(artifact, proof, golden)
        Replay(proof.plan, golden, judges, cancelled, progress).run()
        val passed = judges.firstOrNull { judge -> judge.rows.all { it.passed } }
        return SelfCheckResult(passed?.reference, (passed ?: judges.first()).rows, passed != null)
    }

    private fun judges(artifact: Artifact, proof: ProofPlan, golden: Golden): List<Judge> {
        val judged = proof.artifacts[format].orEmpty()
        if (judged.isEmpty() || judged.keys != artifact.references.toSet()) throw noProof()
        return judged.map { (name, way) ->
            val reference = golden.references[way.key] ?: throw noProof()
            if (!covers(proof.plan, way.tolerances, reference)) throw noProof()
            val own = Limits.of(proof.plan, reference, name)
            if (!proof.plan.walks.keys.all { CheckId.walk(it) in own }) {
                throw Reference.refused("has no logits for every walk")
            }
            Judge(name, reference, Limits.stricter(own, way.tolerances))
        }
    }

    private fun noProof() = ProofPlan.refused("has no proof of .$format")

    /** Do plan, limits and golden vectors belong together and to the model, with a limit for every walk? */
    private fun covers(plan: Plan, within: Tolerances, reference: Reference): Boolean {
        val vision = manifest.model.vision
        val (images, side) = Pair(reference.imagesShape[0], vision?.imageSize ?: 0)
        return reference.ids == plan.ids &&
            reference.imagesShape == listOf(if (vision == null) 0 else images, side, side, Pixels.CHANNELS) &&
            (vision == null || reference.softTokensShape[1] == vision.tokensPerImage) &&
            reference.largestColumn < manifest.model.vocabSize &&
            plan.imageNumbers.all { it in 0 until images } &&
            plan.walks.keys.all { within[CheckId.walk(it)].orEmpty().isNotEmpty() } &&
            CheckId.RESET in within
    }

    /** Feeds everything once, and lets all [judges] compare. */
    private inner class Replay(
        private val plan: Plan,
        private val golden: Golden,
        private val judges: List<Judge>,
        private val cancelled: () -> Boolean,
        private val progress: (Long, Long) -> Unit,
    ) {
        private val softTokens = ArrayList<SoftTokens>()
        private val first = plan.walks.keys.first()
        private var done = 0L
        private val total = plan.walks.keys.sumOf(::countCalls) + countCalls(first) + encodings()

        fun run() {
            for (number in 0 until golden.imageCount) softTokens += encode(number)
            for (judge in judges) judge.begin(softTokens)
            val fresh = HashMap<Int, FloatArray>()
            for (walk in plan.walks.keys) {
                follow(walk) { position, logits ->
                    if (walk == first) fresh[position] = logits
                    for (judge in judges) judge.compare(position, logits)
                }
                for (judge in judges) judge.summarize(walk, plan)
            }
            var most = 0.0
            follow(first) { position, logits -> most = maxOf(most, largestChange(logits, fresh.getValue(position))) }
            for (judge in judges) judge.add(CheckId.RESET, "${title(first)} again after a reset", Metric.MAX_ABS, most)
        }

        /** Feeds the sequence in the walk's steps, from position 0. Gives the position and logits after each step. */
        private fun follow(walk: String, after: (Int, FloatArray) -> Unit) {
            engine.reset()
            for (step in steps(walk)) {
                val logits = step.map { ids -> feed(ids, pixelsToo = walk == first) }.last()
                after(step.last().last, logits)
            }
        }

        /** For each step, the positions of its calls: an image, or text up to the next image or the end, or a chunk. */
        private fun steps(walk: String): List<List<IntRange>> {
            var start = 0
            return plan.walks.getValue(walk).map { length ->
                val end = start + length
                val calls = mutableListOf<IntRange>()
                while (start < end) {
                    val next = when (start) {
                        in plan.imagePlaces -> start + manifest.model.vision!!.tokensPerImage
                        else -> minOf(end, plan.imagePlaces.firstOrNull { it > start } ?: end, start + manifest.chunk)
                    }
                    calls += start until next
                    start = next
                }
                calls
            }
        }

        private fun countCalls(walk: String): Long = steps(walk).sumOf { it.size.toLong() }

        /** Each golden image is encoded once before the walks, and once in each of the two passes of the first walk. */
        private fun encodings(): Long = golden.imageCount + 2L * plan.imageNumbers.distinct().size

        /** Feeds the [positions]. With [pixelsToo] an image is encoded again where it comes first. */
        private fun feed(positions: IntRange, pixelsToo: Boolean): FloatArray {
            val place = plan.imagePlaces.indexOf(positions.first)
            val call = if (place >= 0) {
                val number = plan.imageNumbers[place]
                val again = pixelsToo && plan.imageNumbers.indexOf(number) == place
                Call.Image(if (again) encode(number) else softTokens[number])
            } else {
                Call.Text(plan.ids.slice(positions).toIntArray())
            }
            return counted { checked(engine.feed(call)) }
        }

        private fun encode(number: Int): SoftTokens = counted { engine.encode(golden.image(number)) }

        private fun <T> counted(work: () -> T): T {
            if (cancelled()) throw CancellationException("the self-check was stopped")
            return work().also { progress(++done, total) }
        }

        private fun checked(logits: FloatArray): FloatArray {
            val vocabulary = manifest.model.vocabSize
            if (logits.size == vocabulary) return logits
            throw VerificationFailed(
                ".$format: gives ${logits.size} logits for a vocabulary of $vocabulary; do not use this file",
            )
        }
    }
}

/** Collects the rows of one [reference] of an artifact. */
private class Judge(val reference: String, private val golden: Reference, private val tolerances: Tolerances) {
    val rows = mutableListOf<Row>()
    private val differences = mutableListOf<Difference>()

    fun add(id: String, name: String, metric: String, value: Double) {
        val limit = tolerances[id]?.get(metric)
        rows += Row(id, name, metric, value, limit, Metric.passes(metric, value, limit))
    }

    fun begin(softTokens: List<SoftTokens>) {
        val ofNoise = "the reference against itself, inputs changed by one unit in the last place"
        distances(CheckId.NOISE, ofNoise, golden.noiseKl, golden.softNoise)
        val ofCost = "what rounding costs: the reference against itself without it"
        distances(CheckId.ACTIVATIONS, ofCost, golden.costKl, golden.softCost)
        softTokens.forEachIndexed { number, seen ->
            val rms = Reference.relativeRms(seen, golden.softTokens(number))
            add(CheckId.softTokens(number), "soft tokens of image ${number + 1}", Metric.SOFT_RMS, rms)
        }
    }

    /** What limits are derived from: information. */
    private fun distances(id: String, name: String, kl: FloatArray, soft: FloatArray) {
        if (kl.all { it == 0f }) return
        add(id, name, Metric.KL_MEAN, Limits.mean(kl))
        add(id, name, Metric.KL_MAX, kl.max().toDouble())
        soft.maxOrNull()?.let { add(id, name, Metric.SOFT_RMS, it.toDouble()) }
    }

    fun compare(position: Int, logits: FloatArray) {
        golden.compare(position, logits)?.let { differences += it }
    }

    /** The rows of the figures over all positions of [walk] that were compared since the last. */
    fun summarize(walk: String, plan: Plan) {
        val all = differences.toList()
        differences.clear()
        val id = CheckId.walk(walk)
        val name = "${title(walk)} (${all.size} positions)"
        val worst = all.maxBy { it.kl } // NaN counts as the largest
        add(id, name, Metric.MAX_ABS, all.maxOf { it.maxAbs })
        add(id, name, Metric.MEAN_ABS, all.sumOf { it.sumAbs } / all.sumOf { it.count })
        add(id, name, Metric.RELATIVE_RMS, sqrt(all.sumOf { it.sumSquares } / all.sumOf { it.referenceSquares }))
        add(id, name, Metric.KL_MEAN, all.sumOf { it.kl } / all.size)
        add(id, name, Metric.KL_MAX, worst.kl)
        add(id, name, Metric.KL_WORST_POSITION, worst.position.toDouble())
        add(id, name, Metric.TOP1_AGREEMENT, all.count { it.sameTop } / all.size.toDouble())
        if (walk == PlanShape.ONE_BY_ONE) atLandmarks(plan, all.associateBy { it.position })
    }

    /** A mean can hide a fault at one position, so landmarks are judged by themselves too. */
    private fun atLandmarks(plan: Plan, byPosition: Map<Int, Difference>) {
        for ((landmark, position) in plan.landmarks) {
            val difference = byPosition[position] ?: continue
            val name = "${title(PlanShape.ONE_BY_ONE)}, at $landmark ($position)"
            add(CheckId.landmark(landmark), name, Metric.MAX_ABS, difference.maxAbs)
            add(CheckId.landmark(landmark), name, Metric.KL_MAX, difference.kl)
        }
    }
}

/** A walk's id in words. */
private fun title(walk: String): String = walk.replace('-', ' ')

/** NaN, if one of the two has a NaN. */
private fun largestChange(one: FloatArray, other: FloatArray): Double {
    var most = 0f
    for (index in one.indices) most = maxOf(most, abs(one[index] - other[index]))
    return most.toDouble()
}
