package org.gemmaedge.app.model

import java.io.FileNotFoundException
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.MalformedURLException
import java.net.SocketTimeoutException
import java.net.URI
import java.net.URISyntaxException
import java.net.URL
import org.gemmaedge.core.BadInput

/** The bytes of a file from [offset] on; [total] is the whole file's length, if the source says it. */
class Opened(val stream: InputStream, val offset: Long, val total: Long?)

/** Where the files of a bundle come from: a folder, some files, or an address. */
interface BundleSource {
    /** The bundle's name, as the source has it. */
    val name: String

    /** Whether an import that was cut short may go on later with what is there. */
    val resumes: Boolean

    /**
     * Opens the file [path] of the bundle ("proof/plan.json") at [offset], or at 0 if the source cannot.
     *
     * Throws [BadInput] when there is no such file, and [IOException] when it cannot be read now.
     */
    fun open(path: String, offset: Long): Opened

    /** Lets reads that wait return at once, with an error. */
    fun abort() = Unit
}

/** A bundle below the address [base]: its files are `base/manifest.json`, `base/proof/plan.json` and so on. */
class UrlSource(
    base: String,
    private val httpsOnly: Boolean = true,
    private val timeoutMilliseconds: Int = 30_000,
) : BundleSource {
    private val base: URL = parse(base)
    @Volatile private var connection: HttpURLConnection? = null

    override val name: String = this.base.path.trimEnd('/').substringAfterLast('/').ifEmpty { this.base.host }
    override val resumes get() = true

    override fun open(path: String, offset: Long): Opened {
        val query = base.query?.let { "?$it" }.orEmpty()
        var url = URL(base, "${base.path.trimEnd('/')}/$path$query")
        repeat(MAX_REDIRECTS + 1) {
            val answer = ask(url, offset)
            val code = answer.responseCode
            if (code !in REDIRECTS) return opened(answer, code, path, offset)
            val target = answer.getHeaderField("Location")
                ?: throw BadInput("$url redirects to nowhere; check the address")
            answer.disconnect()
            url = checked(URL(url, target))
        }
        throw BadInput("$base/$path redirects more than $MAX_REDIRECTS times; check the address")
    }

    override fun abort() {
        connection?.disconnect()
    }

    private fun ask(url: URL, offset: Long): HttpURLConnection {
        val answer = url.openConnection() as HttpURLConnection
        connection = answer
        answer.instanceFollowRedirects = false
        answer.connectTimeout = timeoutMilliseconds
        answer.readTimeout = timeoutMilliseconds
        answer.setRequestProperty("Accept-Encoding", IDENTITY)
        if (offset > 0) answer.setRequestProperty("Range", "bytes=$offset-")
        try {
            answer.connect()
            answer.responseCode
        } catch (_: SocketTimeoutException) {
            throw IOException("${url.host} does not answer")
        }
        return answer
    }

    private fun opened(answer: HttpURLConnection, code: Int, path: String, offset: Long): Opened {
        val length = answer.getHeaderField("Content-Length")?.toLongOrNull()
        val encoding = answer.getHeaderField("Content-Encoding") ?: IDENTITY
        if (code in 200..299 && !encoding.equals(IDENTITY, ignoreCase = true)) {
            throw BadInput("${base.host} sends $path compressed (${encoding.take(20)}); use another server")
        }
        return when (code) {
            HttpURLConnection.HTTP_OK -> Opened(answer.inputStream, 0, length)
            HttpURLConnection.HTTP_PARTIAL -> {
                val range = RANGE.matchEntire(answer.getHeaderField("Content-Range").orEmpty())
                    ?: throw BadInput("${base.host} sends a part of $path without its range; use another server")
                val (start, total) = range.destructured
                if (start.toLong() != offset) {
                    throw BadInput("${base.host} sends $path from byte $start, not $offset; use another server")
                }
                Opened(answer.inputStream, offset, total.toLongOrNull())
            }
            RANGE_REFUSED -> if (offset > 0) open(path, 0) else throw refused(path, code)
            HttpURLConnection.HTTP_NOT_FOUND, HttpURLConnection.HTTP_GONE ->
                throw BadInput("$base has no $path (it answers $code); give the address of a bundle's folder")
            in 500..599 -> throw IOException("${base.host} answers $code for $path")
            else -> throw refused(path, code)
        }
    }

    private fun refused(path: String, code: Int) =
        BadInput("${base.host} answers $code for $path; check the address")

    private fun checked(url: URL): URL {
        if (url.protocol != "https" && (httpsOnly || url.protocol != "http")) {
            throw BadInput("$url does not begin with https://; give an address that does")
        }
        return url
    }

    private fun parse(text: String): URL {
        val url = try {
            URI(text.trim().removeSuffix("/" + BundleImport.MANIFEST)).toURL()
        } catch (_: URISyntaxException) {
            throw noAddress(text)
        } catch (_: MalformedURLException) {
            throw noAddress(text)
        } catch (_: IllegalArgumentException) {
            throw noAddress(text)
        }
        if (url.host.isNullOrEmpty()) throw noAddress(text)
        return checked(url)
    }

    private fun noAddress(text: String) =
        BadInput("\"${text.take(100)}\" is no address; give that of a bundle's folder, as in https://example.org/bundle")

    private companion object {
        const val MAX_REDIRECTS = 5
        const val IDENTITY = "identity"
        const val RANGE_REFUSED = 416
        val REDIRECTS = setOf(301, 302, 303, 307, 308)
        val RANGE = Regex("""bytes (\d+)-\d+/(\d+|\*)""")
    }
}

/** Files that the user chose, by path or, where only names are known, by name. */
class ChosenFiles(
    override val name: String,
    private val files: Map<String, () -> InputStream>,
) : BundleSource {
    override val resumes get() = false

    override fun open(path: String, offset: Long): Opened {
        val file = files[path] ?: files[path.substringAfterLast('/')]
            ?: throw BadInput("$path is not among the chosen files; choose the bundle's whole folder")
        return try {
            Opened(file(), 0, null)
        } catch (error: FileNotFoundException) {
            throw BadInput("$path cannot be opened (${error.message}); choose the folder again")
        }
    }
}
