package org.gemmaedge.app.screens

import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.FlowRow
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.text.KeyboardOptions
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.FilterChip
import androidx.compose.material3.HorizontalDivider
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Surface
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.semantics.semantics
import androidx.compose.ui.text.input.KeyboardType
import androidx.compose.ui.text.style.TextAlign
import androidx.compose.ui.unit.dp
import java.util.Locale
import org.gemmaedge.app.model.BenchmarkReport
import org.gemmaedge.app.model.BenchmarkRequest
import org.gemmaedge.app.model.BenchmarkState
import org.gemmaedge.app.model.ModelRow
import org.gemmaedge.app.model.THERMAL_WORDS
import org.gemmaedge.app.model.readable
import org.gemmaedge.core.Rate

@Composable
fun BenchmarkScreen(
    state: BenchmarkState,
    models: List<ModelRow>,
    busy: Boolean,
    onStart: (BenchmarkRequest) -> Unit,
    onStop: () -> Unit,
    onShare: (BenchmarkReport) -> Unit,
) = Column(
    Modifier.fillMaxSize().verticalScroll(rememberScrollState()).padding(16.dp),
    verticalArrangement = Arrangement.spacedBy(12.dp),
) {
    val choices = models.flatMap { model -> model.formats.filter { it.fits }.map { model.name to it.format } }
    var chosen by rememberSaveable { mutableStateOf(0) }
    var prompt by rememberSaveable { mutableStateOf("128") }
    var newTokens by rememberSaveable { mutableStateOf("32") }
    var repetitions by rememberSaveable { mutableStateOf("5") }
    Secondary("Feeds a random prompt (pp) and then single tokens (tg), as llama-bench does, after one run to warm up.")
    val running = state.running
    if (running != null) {
        Progress("Measuring ${running.bundle} .${running.format}", state.progress, onStop)
    } else if (choices.isEmpty()) {
        Text("No model on this phone fits into its memory now; add one on the Models screen.", style = MaterialTheme.typography.bodyLarge)
    } else {
        FlowRow(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
            choices.forEachIndexed { index, (name, format) ->
                FilterChip(chosen == index, { chosen = index }, { Text("$name .$format", maxLines = 1) })
            }
        }
        Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
            Count("prompt", prompt, Modifier.weight(1f)) { prompt = it }
            Count("answer", newTokens, Modifier.weight(1f)) { newTokens = it }
            Count("runs", repetitions, Modifier.weight(1f)) { repetitions = it }
        }
        val counts = listOf(prompt, newTokens, repetitions).map { it.toIntOrNull() ?: 0 }
        val (name, format) = choices.getOrElse(chosen) { choices.first() }
        Button(
            { onStart(BenchmarkRequest(name, format, counts[0], counts[1], counts[2])) },
            enabled = !busy && counts.all { it > 0 },
        ) { Text("Measure") }
    }
    state.error?.let { Message(it, isError = true, onDismiss = null) }
    for (report in state.reports) Report(report, onShare)
}

/** What the phone shows while a laptop measures. */
@Composable
fun RemoteBenchmark(state: BenchmarkState, onStop: () -> Unit) = Surface(Modifier.fillMaxSize()) {
    Column(Modifier.safeDrawingPadding().padding(16.dp), verticalArrangement = Arrangement.spacedBy(12.dp)) {
        Text("Benchmark for a laptop", style = MaterialTheme.typography.titleLarge)
        state.running?.let { Progress("Measuring ${it.bundle} .${it.format}", state.progress, onStop) }
        state.error?.let { Message(it, isError = true, onDismiss = null) }
    }
}

@Composable
private fun Note(text: String) = Column(Modifier.padding(top = 4.dp, bottom = 12.dp)) { Secondary(text) }

@Composable
private fun Count(name: String, value: String, modifier: Modifier, onChange: (String) -> Unit) = OutlinedTextField(
    value, { text -> onChange(text.filter(Char::isDigit).take(5)) }, modifier,
    label = { Text(name, maxLines = 1) },
    singleLine = true,
    keyboardOptions = KeyboardOptions(keyboardType = KeyboardType.Number),
)

@Composable
private fun Report(report: BenchmarkReport, onShare: (BenchmarkReport) -> Unit) = Column {
    Row(verticalAlignment = Alignment.CenterVertically) {
        Text(report.bundle.orEmpty(), Modifier.weight(1f), style = MaterialTheme.typography.titleMedium)
        TextButton({ onShare(report) }) { Text("Share JSON") }
    }
    Line("file, test", "tok/s ± sd (median)", "thermal", heading = true)
    for (one in report.measurements.orEmpty()) {
        val thermal = THERMAL_WORDS.getOrElse(one.thermalStatus) { one.thermalStatus.toString() }
        Line(".${one.format} pp${one.prompt}", words(one.prefill), thermal)
        Line(".${one.format} tg${one.newTokens}", words(one.decode), thermal)
        Note(
            "${one.repetitions} runs · load %.2f s · peak memory of the app ${readable(one.peakRssBytes)}, ".format(Locale.ROOT, one.loadSeconds) +
                "${readable(one.librariesRssBytes)} before the load",
        )
    }
}

@Composable
private fun Line(test: String, rate: String, thermal: String, heading: Boolean = false) = Column {
    val style = if (heading) MaterialTheme.typography.labelMedium else MaterialTheme.typography.bodyMedium
    Row(Modifier.fillMaxWidth().padding(vertical = 6.dp).semantics(mergeDescendants = true) {}) {
        Text(test, Modifier.weight(0.8f), style = style)
        Text(rate, Modifier.weight(1.2f), style = style, textAlign = TextAlign.End)
        Text(thermal, Modifier.weight(0.7f), style = style, textAlign = TextAlign.End)
    }
    HorizontalDivider()
}

private fun words(rate: Rate) = "%.1f ± %.1f (%.1f)".format(Locale.ROOT, rate.mean, rate.sd, rate.median)
