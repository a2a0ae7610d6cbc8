package org.gemmaedge.core

import java.io.File
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive

/** What android_demo/ci/vectors/text.py wrote. */
internal object TextVectors {
    fun file(name: String) = File(VectorFiles.folder("text"), name)

    fun json(name: String): JsonElement = Json.parseToJsonElement(file(name).readText())

    fun tokenizer(name: String) = Tokenizer(file("$name.model").readBytes())
}

internal operator fun JsonElement.get(index: Int): JsonElement = jsonArray[index]

internal operator fun JsonElement.get(name: String): JsonArray = (this as JsonObject).getValue(name).jsonArray

internal val JsonElement.text: String get() = jsonPrimitive.content

internal val JsonElement.ids: IntArray get() = jsonArray.map { it.jsonPrimitive.int }.toIntArray()

internal val JsonElement.isNull: Boolean get() = this is JsonNull
