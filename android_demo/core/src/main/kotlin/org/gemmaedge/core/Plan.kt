package org.gemmaedge.core

import java.io.IOException
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.decodeFromJsonElement

/** What is fed to a model in a proof, and where its logits are compared. docs/bundle.md describes `proof/plan.json`. */
@Serializable
class Plan(
    val ids: List<Int>,
    val walks: Map<String, List<Int>>,
    val landmarks: Map<String, Int>,
    @SerialName("image_places") val imagePlaces: List<Int>,
    @SerialName("image_numbers") val imageNumbers: List<Int>,
)

/** Limits by check id and metric. */
typealias Tolerances = Map<String, Map<String, Double>>

/** How an artifact is judged against one of its references, whose golden arrays begin with [key]. */
@Serializable
class ReferenceProof(val key: String, val reason: String, val tolerances: Tolerances)

/** The proof of a bundle: its plan, and the references of each artifact by format and name. */
@Serializable
class ProofPlan(
    @SerialName("schema_version") val schemaVersion: Int,
    val plan: Plan,
    @SerialName("at_least") val atLeast: List<String>,
    val artifacts: Map<String, Map<String, ReferenceProof>>,
) {
    companion object {
        const val FILE = "proof/plan.json"
        private const val SCHEMA_VERSION = 2
        private const val MOST_BYTES = 8L shl 20 // a plan over 100 000 positions: two megabytes

        /** Throws [VerificationFailed] when the plan is damaged, of another schema, or another model's. */
        fun read(bundle: Bundle): ProofPlan {
            val proof = try {
                parse(bundle)
            } catch (_: IOException) {
                throw refused("cannot be read")
            } catch (error: IllegalArgumentException) { // what JSON of another form throws too
                throw refused("not the plan of a proof (${oneLine(error)})")
            } catch (_: StackOverflowError) {
                throw refused("not the plan of a proof (lists in lists without end)")
            }
            if (!isSound(proof, bundle.manifest)) throw refused("cannot be fed to this bundle's model")
            return proof
        }

        private fun parse(bundle: Bundle): ProofPlan {
            val file = bundle.file(FILE)
            require(file.length() <= MOST_BYTES) { "${file.length()} bytes" }
            val json = Json.parseToJsonElement(file.readBytes().decodeToString(throwOnInvalidSequence = true))
            val version = (json as? JsonObject)?.get("schema_version")
            require(version.toString() == "$SCHEMA_VERSION") {
                "schema_version is $version, this app reads $SCHEMA_VERSION"
            }
            return Json.decodeFromJsonElement(json)
        }

        internal fun refused(reason: String) = VerificationFailed("$FILE: $reason; export the bundle again")

        private fun isSound(proof: ProofPlan, manifest: Manifest): Boolean {
            val plan = proof.plan
            val vision = manifest.model.vision
            val keys = plan.walks.keys + plan.landmarks.keys
            return manifest.chunk > 0 && manifest.model.slidingWindow > 0 && // or no plan can be made
                plan.ids.size in 1..manifest.context &&
                plan.ids.all { it in 0 until manifest.model.vocabSize } &&
                plan.landmarks.values.all { it in plan.ids.indices } &&
                keys.all { key -> key.all { it in ' '..'~' } } &&
                Metric.ALL.filter { it in proof.atLeast } == listOf(Metric.TOP1_AGREEMENT) &&
                plan.imageNumbers.size == plan.imagePlaces.size &&
                imageRuns(plan, vision) == plan.imagePlaces &&
                plan.walks.values.all { isWalk(it, plan, vision) } &&
                PlanShape.of(manifest).any { it.isThatOf(plan) }
        }

        /** Do [lengths] add up to the plan's sequence, without a cut inside an image? */
        private fun isWalk(lengths: List<Int>, plan: Plan, vision: Vision?): Boolean {
            if (lengths.any { it !in 1..plan.ids.size } || lengths.sumOf { it.toLong() } != plan.ids.size.toLong()) {
                return false
            }
            val cuts = lengths.runningReduce(Int::plus).toSet()
            return plan.imagePlaces.none { place ->
                (place + 1 until place + vision!!.tokensPerImage).any { it in cuts }
            }
        }

        /** Where the images' ids begin; null if a run of them is not as long as an image. */
        private fun imageRuns(plan: Plan, vision: Vision?): List<Int>? {
            vision ?: return emptyList()
            fun isImage(position: Int) = plan.ids.getOrNull(position) == vision.imageTokenId
            val starts = plan.ids.indices.filter { isImage(it) && !isImage(it - 1) }
            val whole = starts.all { start ->
                val end = start + vision.tokensPerImage
                (start until end).all(::isImage) && !isImage(end)
            }
            return starts.takeIf { whole }
        }
    }
}

/** The first sentence of [error], for a message. */
internal fun oneLine(error: Exception): String =
    (error.message ?: error.javaClass.simpleName).lineSequence().first().substringBefore(". ").take(120)
