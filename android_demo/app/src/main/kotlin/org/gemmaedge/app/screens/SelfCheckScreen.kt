package org.gemmaedge.app.screens

import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.PaddingValues
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.selection.toggleable
import androidx.compose.material3.Button
import androidx.compose.material3.HorizontalDivider
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.Switch
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.semantics.Role
import androidx.compose.ui.semantics.semantics
import androidx.compose.ui.text.style.TextAlign
import androidx.compose.ui.unit.dp
import java.util.Locale
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.SelfCheckState
import org.gemmaedge.core.Row as Figure

@Composable
fun SelfCheckScreen(state: SelfCheckState, load: Load, busy: Boolean, onStart: () -> Unit, onStop: () -> Unit) {
    var all by rememberSaveable { mutableStateOf(false) }
    val step = state.step
    val result = state.result
    LazyColumn(
        Modifier.fillMaxSize(), contentPadding = PaddingValues(16.dp), verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        item {
            Column(verticalArrangement = Arrangement.spacedBy(8.dp)) {
                Secondary(
                    "Compares every file with its sha256, then replays the proof that came with the model: the answers " +
                        "that it gives on this phone against those it must give.",
                )
                when {
                    step != null -> Progress(step, state.progress, onStop)
                    load is Load.Ready -> Button(onStart, enabled = !busy) { Text("Check ${load.name} (.${load.format})") }
                    else -> Text("Load a model on the Models screen first.", style = MaterialTheme.typography.bodyLarge)
                }
                state.error?.let { Message(listOfNotNull(state.model, it).joinToString(": "), isError = true, onDismiss = null) }
            }
        }
        if (result != null) {
            item {
                val verdict = if (result.passed) "is what its bundle says (limits of ${result.reference})."
                else "is NOT what its bundle says. Do not use it; get the bundle again."
                Message("${state.model.orEmpty()} $verdict", isError = !result.passed, onDismiss = null)
            }
            item {
                Row(
                    Modifier.fillMaxWidth().toggleable(all, role = Role.Switch) { all = it },
                    verticalAlignment = Alignment.CenterVertically,
                ) {
                    Text("Figures without a limit too", Modifier.weight(1f), style = MaterialTheme.typography.bodyMedium)
                    Switch(all, onCheckedChange = null, Modifier.padding(8.dp))
                }
            }
            item { Line("check", "value", "limit", failed = false, heading = true) }
            items(result.rows.filter { all || it.limit != null || !it.passed }) { FigureLine(it) }
        }
    }
}

@Composable
private fun FigureLine(row: Figure) {
    val mark = if (row.passed) "" else "✗ "
    Line("$mark${row.name}\n${row.metric}", figure(row.value), row.limit?.let(::figure) ?: "–", failed = !row.passed)
}

@Composable
private fun Line(check: String, value: String, limit: String, failed: Boolean, heading: Boolean = false) = Column {
    val style = if (heading) MaterialTheme.typography.labelLarge else MaterialTheme.typography.bodySmall
    val color = if (failed) MaterialTheme.colorScheme.error else MaterialTheme.colorScheme.onSurface
    Row(Modifier.fillMaxWidth().padding(vertical = 6.dp).semantics(mergeDescendants = true) {}) {
        Text(check, Modifier.weight(1f).padding(end = 8.dp), style = style, color = color)
        Text(value, Modifier.weight(0.4f), style = style, color = color, textAlign = TextAlign.End)
        Text(limit, Modifier.weight(0.4f), style = style, color = color, textAlign = TextAlign.End)
    }
    HorizontalDivider()
}

private fun figure(value: Double): String = when (value) {
    0.0, 1.0 -> "%.0f"
    in 0.001..9999.0 -> "%.4f"
    else -> "%.1e"
}.format(Locale.ROOT, value)
